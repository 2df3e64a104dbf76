"""Every combination of SRPO's options: it trains, the same in any cut of the step, or is refused.

What is allowed is written down here once more, apart from `Config`, so that neither can drift.
"""

from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import jax
import numpy as np
import optax
import pytest
import tiny

from saro_jax.config import Config
from saro_jax.data.packing import Shape, arrange, pack
from saro_jax.parallel import mesh as meshes
from saro_jax.training import loop, mismatch, step, trainable
from saro_jax.training.mismatch import Mismatches
from saro_jax.training.scoring import make_scorer, score_items

LOSSES = (
    *("sigmoid", "robust", "hinge", "identity_po", "apo_zero", "apo_down"),
    *("simpo", "orpo", "kto"),
)
LENGTHS = ("sum", "mean", "desensitised")
SCOPES, LAYOUTS, REFERENCES = ("suffix", "step"), ("shared", "separate"), ("stored", "resident")
PARTS = ((1.0, 1.0), (2.0, 0.5))  # weights of reasoning and answer
DATA = list(product(SCOPES, LAYOUTS, REFERENCES))  # change arrays, not programs
SHAPES = {layout: Shape(160, 4, layout) for layout in LAYOUTS}
COUNT = 6


def allowed(loss: str, length: str, parts, scope: str, layout: str, reference: str) -> bool:
    if length != "sum" and loss in ("identity_po", "simpo", "orpo", "kto"):
        return False
    if parts != PARTS[0] and loss in ("simpo", "orpo", "kto"):
        return False
    if loss == "kto" and (scope, layout) != ("suffix", "shared"):
        return False
    return not (reference == "resident" and loss in ("simpo", "orpo"))


def settings(loss, length, parts, scope, layout, reference) -> dict[str, Any]:
    found = {"loss": loss, "length": length, "scope": scope, "layout": layout}
    found |= {"reference": reference, "reasoning_weight": parts[0], "answer_weight": parts[1]}
    return found | ({"label_smoothing": 0.1} if loss == "robust" else {})


def config(rank: int = 0, **srpo) -> Config:
    model = {"dtype": "float32", "remat": "none"}
    parts = {"data": {"train": "x"}, "model": model, "srpo": srpo, "lora": {"rank": rank}}
    return Config.model_validate(parts)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_combination_is_accepted_or_refused_in_one_line(loss):
    refused = 0
    for choice in product((loss,), LENGTHS, PARTS, SCOPES, LAYOUTS, REFERENCES):
        if allowed(*choice):
            config(**settings(*choice))
            continue
        refused += 1
        with pytest.raises(ValueError) as error:
            config(**settings(*choice))
        message = error.value.errors()[0]["ctx"]["error"].args[0]  # pyright: ignore
        assert message.startswith("srpo.") and "\n" not in message and f"loss={loss}" in message
    assert (refused == 0) == (loss in ("sigmoid", "robust", "hinge", "apo_zero", "apo_down"))


@cache
def params(seed=0):
    tiny.folder()
    return tiny.params(seed)


@cache
def trees(rank):
    """Trained, frozen and reference tree: another model, or adapters beside the reference model."""
    if not rank:
        return params(), {}, params(1)
    start, frozen = trainable.start(tiny.ARCH, config(rank), params(1), meshes.make_mesh())
    return jax.tree.map(lambda x: x + 0.05, start), frozen, start


@cache
def items(paired: bool, scope: str):
    """Pairs, or responses good and bad in turn: reasoning first; a step is its first 3 tokens."""

    def branch(b):
        n = len(b.ids)
        scored = b.scored & (np.arange(n) < 3) if scope == "step" else b.scored
        return replace(b, scored=scored, reasoning=np.arange(n) < n // 2)

    found = []
    for i in range(COUNT):
        lengths = (4 + 5 * (i % 3), 3 + 4 * i) if paired else (4 + 5 * i,)
        one = tiny.item(i, 3 + 4 * i, *lengths, weight=1 + i % 3)
        branches = tuple(map(branch, one.branches))
        found.append(replace(one, branches=branches, label=i % 2 == 0))
    return found


def scored(some, layout):
    """Log-prob sums of items under the reference, float32 [n, K, G]."""
    K = len(some[0].branches)
    scorer = scorer_of(K)
    rows = score_items(
        scorer, params(1), some, [arrange(some, range(len(some)), SHAPES[layout])], SHAPES[layout]
    )
    found = {i: logp for i, logp, _ in rows}
    return np.stack([found[i] for i in range(len(some))])


@cache
def scorer_of(branches):
    mesh = meshes.make_mesh()
    return make_scorer(tiny.ARCH, mesh, dtype=np.float32, remat="none", branches=branches)


@cache
def stored(paired, scope, layout):
    return scored(items(paired, scope), layout)


@cache
def stored_mismatches():
    some = items(False, "suffix")
    matches = mismatch.matches(range(COUNT))
    joined = [mismatch.join(some, match, 80) for match in matches]
    return dict(zip(matches, scored(joined, "shared"), strict=True))


@cache
def programs(loss, length, parts, rank):
    chosen = settings(loss, length, parts, "suffix", "shared", "stored")
    made = step.programs(tiny.ARCH, config(rank, **chosen), "srpo", optax.identity())
    return made if loss == "kto" else made._replace(score=score(rank))


@cache
def score(rank):
    """The scoring of pairs, which no loss changes: compiled once."""
    return step.programs(tiny.ARCH, config(rank), "srpo", optax.identity()).score


def one_step(pieces, rank, loss, scope, layout, reference, groups):
    """Loss and gradient of a step of all items, packed in the groups given."""
    paired, mesh = loss != "kto", meshes.make_mesh()
    some = items(paired, scope)
    blocks = [b for group in groups for b in pack(some, group, **SHAPES[layout]._asdict())]
    trained, frozen, before = trees(rank)
    resident = before if reference == "resident" else None
    needs = reference == "stored" and loss not in ("simpo", "orpo")
    with jax.set_mesh(mesh):
        baseline = 0.0
        if not paired:
            known = None if resident else stored_mismatches()
            given = Mismatches(some, SHAPES[layout], 80, known)
            baseline = loop.kto_baseline(pieces, mesh, trained, frozen, resident, blocks, given)
        gradients = loop.Gradients(pieces, trained, frozen)
        sums = loop.run_blocks(
            mesh,
            "srpo",
            blocks,
            stored(paired, scope, layout) if needs else None,
            gradients.add,
            score=partial(pieces.score, resident, frozen) if resident else None,
            baseline=baseline,
        )
    return loop.summarise("srpo", jax.device_get(sums)), gradients.sum


def check(loss, length, parts, rank):
    """All layouts, scopes and references of one program; accumulated equals the whole step."""
    pieces, losses = programs(loss, length, parts, rank), {}
    for data in DATA:
        if not allowed(loss, length, parts, *data):
            continue
        whole, gradient = one_step(pieces, rank, loss, *data, [range(COUNT)])
        cut, summed = one_step(pieces, rank, loss, *data, [[0, 3], [1], [5, 4, 2]])
        for name, value in whole.items():
            assert np.isfinite(value)
            assert cut[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (data, name)
        for x, y in zip(*map(jax.tree.leaves, (gradient, summed)), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            assert np.isfinite(x).all() and x.any(), data
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(x).max())
        losses[data] = whole["loss"]
    for scope in SCOPES:  # neither the layout nor where the reference lies moves a number
        same = [value for (where, *_), value in losses.items() if where == scope]
        assert max(same, default=0.0) == pytest.approx(min(same, default=0.0), rel=1e-5)
    if loss != "kto":
        assert losses["suffix", "shared", "stored"] != losses["step", "shared", "stored"]


RANKS = (0, 2)  # adapters off and on
PROGRAMS = [
    (*p, rank)
    for p in product(LOSSES, LENGTHS, PARTS)
    for rank in RANKS
    if allowed(*p, "suffix", "shared", "stored")
]
QUICK = [p for p in PROGRAMS if p[1:] == ("sum", PARTS[0], 0)]
QUICK += [("hinge", "desensitised", PARTS[1], 0), ("sigmoid", "mean", PARTS[1], 2)]
QUICK += [("kto", "sum", PARTS[0], 2)]


@pytest.mark.parametrize(("loss", "length", "parts", "rank"), QUICK)
def test_a_combination_trains_in_any_cut(loss, length, parts, rank):
    check(loss, length, parts, rank)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "length", "parts", "rank"), [p for p in PROGRAMS if p not in QUICK]
)
def test_the_other_combinations_too(loss, length, parts, rank):
    check(loss, length, parts, rank)


def test_the_baseline_depends_on_the_step_alone():
    """KTO's z0 is positive here and equals the mean over the mismatched rows, one by one."""
    some, mesh = items(False, "suffix"), meshes.make_mesh()
    pieces = programs("kto", "sum", PARTS[0], 0)
    blocks = list(pack(some, range(COUNT), **SHAPES["shared"]._asdict()))
    given = Mismatches(some, SHAPES["shared"], 80, None)
    ratios = []
    for match in mismatch.matches(range(COUNT)):
        joined = mismatch.join(some, match, 80)
        policy, before = (tiny.item_logps(params(seed), joined)[0] for seed in (0, 1))
        ratios.append(policy - before)
    with jax.set_mesh(mesh):
        one = loop.kto_baseline(pieces, mesh, params(), {}, params(1), blocks, given)
        other = loop.kto_baseline(pieces, mesh, params(1), {}, params(), blocks, given)
    assert max(float(one), float(other)) == pytest.approx(abs(np.mean(ratios)), rel=1e-4)
    assert min(float(one), float(other)) == 0.0
