"""The doctor before a run: what the rows, the tokenizer and the settings will do to it.

Pure functions, on the host, before a weight is read. `watch` goes on with the metrics.
"""

from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from saro_jax.config import Config
from saro_jax.data.packing import Shape
from saro_jax.data.rows import Reject
from saro_jax.data.tokenise import Item
from saro_jax.models.architecture import Architecture
from saro_jax.training.doctor.preferences import labels, length_bias, pairs
from saro_jax.training.doctor.rows import ends, kinds, lost, prompts, template, vocabulary
from saro_jax.training.doctor.settings import hyperparameters, packing
from saro_jax.training.finding import LEVELS, Finding
from saro_jax.training.memory import Answering, device_memory, memory


def before(
    config: Config,
    stage: str,
    arch: Architecture,
    tokenizer: Any,
    shape: Shape,
    mesh: Mesh,
    *,
    items: Sequence[Item],
    rejects: Sequence[Reject],
    total: int,
    evaluation: Sequence[Item],
    steps: int,
    answering: Answering | None = None,
) -> list[Finding]:
    """Everything that can be told without weights, the gravest first."""
    findings = [
        *template(tokenizer, arch),
        *vocabulary(items, tokenizer, arch),
        *lost(rejects, total, config),
        *ends(items, tokenizer, config),
        *pairs(items, rejects),
        *length_bias(items),
        *prompts(items, evaluation, tokenizer, config),
        *labels(items),
        *kinds(items),
        *hyperparameters(config, stage, arch, items, steps),
        *packing(config, items, shape, steps),
        *memory(config, stage, arch, shape, mesh, device_memory(), answering),
    ]
    return sorted(findings, key=lambda finding: -LEVELS.index(finding.level))
