"""Tests analysis/side_by_side.py: one layer for all models, and what two of them have."""

from saro_jax.analysis import side_by_side
from saro_jax.analysis.results import Analysis, Authenticity, Depth, Overlap, Probe


def overlap(model: str, layer: int, c2st: float) -> Overlap:
    return Overlap(
        model=model,
        layer=layer,
        groups=("harmful", "benign"),
        n=(9, 9),
        c2st=c2st,
        c2st_length=0.6,
        knn_purity=0.5,
        centroid_cosine=0,
        mmd2=0,
        p=1,
    )


def probe(model: str, layer: int, auroc: float, position: str = "prompt") -> Probe:
    return Probe(
        model=model, layer=layer, position=position, train="a|b", test="c|d", auroc=auroc,
        selectivity=None, n=9,
    )  # fmt: skip


def test_the_layer_is_the_first_models():
    given = [overlap("base", 0, 0.7), overlap("base", 1, 0.8), overlap("base", 2, 0.6)]
    given += [overlap("rw", 0, 0.99), overlap("rw", 1, 0.5)]
    probes = [probe("base", 0, 0.6), probe("base", 1, 0.1), probe("rw", 0, 1), probe("rw", 1, 0.4)]
    probes += [probe("base", 0, 1, "3"), probe("rw", 0, 1, "3")]  # a step: in the picture
    found = side_by_side.rows(
        Analysis(models=("base", "rw"), overlap=tuple(given), probes=tuple(probes))
    )
    assert [one.of for one in found] == [
        "harmful / benign, layer 1",
        "c / d, the prompt's end, layer 1",  # below 0.5 is a finding too
    ]
    said = [{name: one.text for name, one in row.values.items()} for row in found]
    assert said == [{"base": "0.80", "rw": "0.50"}, {"base": "0.10", "rw": "0.40"}]
    assert found[0].values["rw"].below == "length alone 0.60"


def test_what_one_model_alone_has_is_left_out():
    changed = Authenticity(
        model="rw", test="ban", metric="x", n=5, before=0, after=1, delta=1, low=0, high=1
    )
    depth = [
        Depth(model=name, k=k, n=4, asr=k / 8, low=0, high=1)
        for name in ("base", "rw")
        for k in (0, 2, 8)
    ]
    analysis = Analysis(models=("base", "rw"), depth=tuple(depth), authenticity=(changed,))
    found = side_by_side.rows(analysis)
    assert [one.of for one in found] == ["0 prefilled tokens", "8 prefilled tokens"]
    assert found[1].values["rw"] == side_by_side.Value("100%", "[0%, 100%]")
    alone = analysis.model_copy(update={"models": ("rw",)})
    assert len(side_by_side.rows(alone)) == 3
