"""Tests analysis/results.py: what is written is read back; what is wrong is named."""

import json
from pathlib import Path

import pytest

from saro_jax.analysis import results
from saro_jax.analysis.results import (
    Analysis,
    Depth,
    Likelihood,
    Map,
    Margin,
    Overlap,
    Point,
    Probe,
)

ANALYSIS = Analysis(
    models=("base", "srpo"),
    groups={"harmful": 3, "benign": 4},
    overlap=(
        Overlap(
            model="base",
            layer=2,
            groups=("harmful", "benign"),
            n=(3, 4),
            c2st=0.75,
            c2st_length=0.5,
            knn_purity=0.5,
            centroid_cosine=-0.25,
            mmd2=-0.01,
            p=0.4,
        ),
    ),
    maps=(
        Map(
            model="base",
            layer=2,
            method="pca",
            points=(Point(id="a", kind="harmful", x=1.5, y=-2.0),),
        ),
    ),
    probes=(
        Probe(
            model="base",
            layer=1,
            position="step 1",
            train="harmful|benign",
            test="jailbreak|borderline",
            auroc=None,
            selectivity=None,
            shift={"jailbreak": 0.5},
            n=0,
        ),
    ),
    likelihood=(
        Likelihood(model="srpo", condition="shuffled", mean=-1.0, low=-2.0, high=0.0, n=9),
    ),
    depth=(Depth(model="srpo", k=4, n=10, asr=0.5, low=0.2, high=0.8),),
    margins=(Margin(model="srpo", kind="OP1", step=3, margin=0.1),),
    provenance={"config": {"seed": 0}},
)


def test_what_is_written_is_read_back(tmp_path: Path):
    file = results.write(tmp_path / "out", ANALYSIS)
    assert file == tmp_path / "out" / "analysis.json"
    assert results.read(tmp_path / "out") == results.read(file) == ANALYSIS
    before = file.read_bytes()
    results.write(tmp_path / "out", ANALYSIS)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "base"}, "model: Extra inputs are not permitted"),
        ({"models": "base"}, "models: "),
        (
            {"depth": [{"model": "a", "k": -1, "n": 1, "asr": 0, "low": 0, "high": 1}]},
            "depth.0.k: ",
        ),
        ({"depth": [{"model": "a", "k": 1, "n": 1, "asr": 2, "low": 0, "high": 1}]}, "depth.0.asr"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, change: dict, said: str):
    file = results.write(tmp_path, ANALYSIS)
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as raised:
        results.read(tmp_path)
    assert said in str(raised.value)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nowhere: cannot be read: No such file"):
        results.read(tmp_path / "nowhere")


def test_not_finite_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        Point(id="a", kind="benign", x=float("nan"), y=0.0)
