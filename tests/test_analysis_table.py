"""Tests analysis/table.py: the tables show each result where it says most, and what is missing."""

from pathlib import Path

from saro_jax.analysis import table
from saro_jax.analysis.results import Analysis, Authenticity, Depth, Likelihood, Margin, Probe

NONE = {"drop_reasons": {}}


def probe(layer: int, auroc: float | None, test: str = "jailbreak|wrapped") -> Probe:
    return Probe(
        model="m",
        layer=layer,
        position="end",
        train="harmful|benign",
        test=test,
        auroc=auroc,
        selectivity=None if auroc is None else auroc - 0.6,
        n=9,
    )


def test_an_auroc_below_a_half_is_shown():
    found = Analysis(
        models=("m",),
        probes=(probe(0, 0.5), probe(1, 0.05), probe(2, 0.7), probe(3, None, "a|b")),
    )
    text = table.summary(found, NONE, Path("out"))
    assert "| m | end | jailbreak / wrapped | 1 | 0.05 | -0.55 | 9 |" in text
    assert "a / b" not in text
    assert text.endswith("all results       out/analysis.json")


def test_several_models_come_side_by_side_first():
    margins = tuple(
        Margin(model=name, kind="OP1", margin=i / 2, accuracy=0.5, chosen=-3, rejected=-4, n=8)
        for i, name in enumerate(("m", "other"))
    )
    found = Analysis(models=("m", "other"), probes=(probe(0, 0.5),), margins=margins)
    lines = table.summary(found, NONE, Path("out")).splitlines()
    assert lines[1:4] == [
        "| measure | of | m | other |",
        "|---|---|---|---|",
        "| reward margin | OP1 | +0.000 right 50% | +0.500 right 50% |",
    ]


def test_every_part_has_its_table():
    interval = {"low": 0.1, "high": 0.6}
    found = Analysis(
        models=("m", "other"),
        likelihood=(Likelihood(model="m", condition="gain:reasoning", mean=0.25, n=3, **interval),),
        depth=tuple(Depth(model="m", k=k, n=7, asr=k / 10, low=0, high=1) for k in (0, 4)),
        margins=(
            Margin(model="m", kind="OP1", margin=0.5, accuracy=0.75, chosen=-3, rejected=-4, n=8),
            Margin(model="m", kind="all", step=3, margin=9.0),
        ),
        authenticity=(
            Authenticity(
                model="m", test="ban", metric="complied", n=5, before=0.2, after=0.6, delta=0.4,
                low=-0.1, high=0.7,
            ),
        ),
    )  # fmt: skip
    lines = table.summary(found, {"drop_reasons": {"too long": 2}}, Path("out")).splitlines()
    assert "| m | gain:reasoning | +0.250 [+0.100, +0.600] | 3 |" in lines
    assert "| model | k=0 | k=4 | n |" in lines and "| m | 0.00 | 0.40 | 7 |" in lines
    assert "| m | OP1 | +0.500 | 0.75 | -3.0 | -4.0 | 8 |" in lines
    assert "| m | ban | complied | 0.20 | 0.60 | +0.40 [-0.10, +0.70] | 5 |" in lines
    assert "left out          2 too long" in lines
    assert not any("9.0" in line or line.startswith("| other") for line in lines)
