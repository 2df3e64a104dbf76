"""Losses against the numbers of TRL's own code, kept by benchmarks/trl_losses.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.config import SRPOConfig
from saro_jax.objectives import preference
from saro_jax.objectives.kto import baseline, kto

RECORD = json.loads(Path(__file__).with_name("trl_losses.json").read_text())
SETTINGS = {"robust": {"label_smoothing": 0.2}, "simpo": {"target_margin": 0.5}}


def segments(branches: list[list[float]]) -> list[tuple[list[float], list[float]]]:
    """(sums, tokens) of each branch of a pair by segment; all of it is answer."""
    short = min(map(len, branches))
    return [
        ([0, 0, sum(b[:short]), sum(b[short:])], [0, 0, short, len(b) - short]) for b in branches
    ]


def pairs(noise: float) -> preference.Pairs:
    columns = []
    for pair in RECORD["pairs"]:
        policy, reference = segments(pair["policy"]), segments(pair["reference"])
        sums = [branch[0] for branch in (*policy, *reference)]
        columns.append([*sums, *(branch[1] for branch in policy)])
    fields = jnp.asarray(np.array(columns, np.float32).swapaxes(0, 1))
    return preference.Pairs(*fields, noise=jnp.full(len(columns), noise, jnp.float32))


@pytest.mark.parametrize("name", [name for name in RECORD["losses"] if "kto" not in name])
def test_pairwise_losses_are_trls(name: str):
    loss, *length, beta = name.split(" ")
    settings = SETTINGS.get(loss, {}) | ({"length": length[0]} if length else {})
    if length == ["desensitised"]:
        settings["length_alpha"] = 0.3
    config = SRPOConfig.model_validate({"loss": loss, "beta": float(beta)} | settings)
    found = preference.losses(pairs(config.label_smoothing), config)
    np.testing.assert_allclose(found, RECORD["losses"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_kto_is_trls(beta: float):
    ratios, labels = [], []
    for pair in RECORD["pairs"]:
        for policy, reference, label in zip(pair["policy"], pair["reference"], (1, 0), strict=True):
            ratios.append(sum(policy) - sum(reference))
            labels.append(label)
    z0 = baseline(jnp.asarray(sum(ratios) + 20.0 * len(ratios)), len(ratios))
    config = SRPOConfig(loss="kto", beta=beta, desirable_weight=1.5, undesirable_weight=0.5)
    found = kto(jnp.asarray(ratios), jnp.asarray(labels), z0, config).mean()
    loss, wanted = RECORD["losses"][f"kto {beta}"]
    assert float(z0) == pytest.approx(wanted, rel=1e-5) and wanted > 1
    assert float(found) == pytest.approx(loss, rel=1e-5)
