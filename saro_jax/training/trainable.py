"""Which leaves train: the split of a model into what the step differentiates and what it reads.

The trained tree is the model's own tree without the frozen leaves, and the adapters under "lora".
Without adapters and freezing it is the model's tree as it is, and the frozen one is {}.
"""

import difflib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from saro_jax.config import Config, names
from saro_jax.models import decoder, lora
from saro_jax.models.architecture import Architecture
from saro_jax.parallel import sharding

Tree = dict[str, Any]
LORA = "lora"


def trained_names(arch: Architecture, config: Config) -> set[str]:
    """Names ("model/norm/weight") of the model's own leaves that train.

    A pattern of train.freeze that matches nothing is a ValueError, and so is a run in which
    nothing trains.
    """
    leaves = jax.tree_util.tree_flatten_with_path(decoder.abstract_params(arch))[0]
    everything = [sharding.path_name(path) for path, _ in leaves]
    patterns = names(config.train.freeze)
    if config.train.freeze is None and config.lora.rank:
        patterns = [""]
    elif patterns == ["none"]:
        patterns = []
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in everything):
            (near,) = difflib.get_close_matches(pattern, everything, 1, cutoff=0.0)
            raise ValueError(
                f"train.freeze: {pattern!r} matches no parameter; the nearest is {near}"
            )
    trained = {name for name in everything if not any(re.search(p, name) for p in patterns)}
    if not trained and not config.lora.rank:
        raise ValueError(
            f"train.freeze={', '.join(patterns)}: every parameter is frozen and lora.rank=0, so "
            "nothing would train"
        )
    return trained


def trains_head(arch: Architecture, config: Config) -> bool:
    """Whether the output matrix needs a gradient: a table tied to it counts as the matrix."""
    head = "model/embed_tokens/weight" if arch.tie_word_embeddings else "lm_head/weight"
    return head in trained_names(arch, config)


def abstract_model(arch: Architecture, config: Config) -> Tree:
    """Shapes and dtypes of the model's own leaves, trained and frozen ones."""
    trained = trained_names(arch, config)
    kept = jnp.dtype(config.model.param_dtype)
    frozen = jnp.dtype(config.model.frozen_dtype or kept)

    def one(path, leaf):
        dtype = kept if sharding.path_name(path) in trained else frozen
        return jax.ShapeDtypeStruct(leaf.shape, dtype)

    return jax.tree_util.tree_map_with_path(one, decoder.abstract_params(arch))


def abstract_adapters(arch: Architecture, config: Config) -> Tree:
    """Shapes and dtypes of the adapters; {} without."""
    base = decoder.abstract_params(arch)
    return lora.abstract(config.lora, arch, base, jnp.dtype(config.model.param_dtype))


def split(params: Tree, trained: set[str]) -> tuple[Tree, Tree]:
    """(trained, frozen) leaves of a model's tree, none of them copied."""
    kept, frozen = _pick(params, lambda n: n in trained), _pick(params, lambda n: n not in trained)
    return kept, frozen


def _pick(tree: Tree, wanted, prefix: str = "") -> Tree:
    found: Tree = {}
    for key, part in tree.items():
        if isinstance(part, dict):
            if inner := _pick(part, wanted, f"{prefix}{key}/"):
                found[key] = inner
        elif wanted(prefix + key):
            found[key] = part
    return found


def join(trained: Tree, frozen: Tree) -> Tree:
    """The model's tree again, with the adapters under "lora" if there are any."""
    found = dict(trained)
    for key, part in frozen.items():
        found[key] = join(found[key], part) if key in found else part
    return found


def abstract(arch: Architecture, config: Config) -> tuple[Tree, Tree]:
    """Shapes of the (trained, frozen) trees of a run."""
    trained, frozen = split(abstract_model(arch, config), trained_names(arch, config))
    if adapters := abstract_adapters(arch, config):
        trained[LORA] = adapters
    return trained, frozen


def start(arch: Architecture, config: Config, params: Tree, mesh: Mesh) -> tuple[Tree, Tree]:
    """The (trained, frozen) trees at step 0, with new adapters where the config has some."""
    trained, frozen = split(params, trained_names(arch, config))
    if shapes := abstract_adapters(arch, config):
        # Names of the full tree, for the table of rules to know an adapter's place.
        places = sharding.shardings(mesh, {LORA: shapes})[LORA]
        make = jax.jit(lambda: lora.init(shapes, config.seed), out_shardings=places)
        trained[LORA] = make()
    return trained, frozen


def apart(
    config: Config, params: Tree, key: jax.Array | None = None
) -> tuple[Tree, lora.Adapters | None]:
    """A joined tree as the model's own leaves and its adapters; `key` draws their dropout."""
    base = {name: part for name, part in params.items() if name != LORA}
    return base, lora.bind(config.lora, params.get(LORA), key)


def check_base(saved: str | None, now: str | None, folder: Path, out: Path) -> None:
    """Refuse to go on from a checkpoint whose frozen weights came from other files."""
    if saved != now:
        raise ValueError(
            f"{folder}: the weights are not those that the run in {out} froze (hash {now}, there "
            f"{saved}); restore them or start again in another folder"
        )


def why_no_peft(arch: Architecture, config: Config) -> str | None:
    """Why adapters alone do not say what was learnt; None where they do."""
    if not config.lora.rank:
        return "lora.rank=0, there are no adapters"
    if trained := trained_names(arch, config):
        return (
            f"{len(trained)} weights of the model were trained too (train.freeze), such as "
            f"{min(trained)}; only the merged model has both"
        )
    return None


def peft_settings(config: Config, folder: Path) -> dict[str, Any]:
    """adapter_config.json of a run on the model in `folder`, named as the run names it."""
    path = str(config.model.path)
    local = path == "quickstart" or Path(path).exists()
    base = str(folder.resolve()) if local else path
    return lora.peft_config(config.lora, base, config.model.revision)
