"""One step: its losses, metrics and update against the formulas written out in numpy."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from saro_jax.config import Config
from saro_jax.data.packing import pack
from saro_jax.parallel import mesh as meshes
from saro_jax.training import loop, step

ITEMS = {"rw": tiny.items("sft"), "srpo": tiny.items("preference")}
REFERENCE = np.random.default_rng(2).normal(-50, 5, size=(8, 2)).astype(np.float32)
SEGMENTS = tiny.segments(REFERENCE)
BETA = 0.1


@cache
def params():
    tiny.folder()
    return tiny.params()


def config(**parts):
    base = {"data": {"train": "x"}, "model": {"dtype": "float32", "remat": "none"}}
    return Config.model_validate(base | parts)


@cache
def programs(stage):
    return step.programs(tiny.ARCH, config(), stage, optax.sgd(0.5))


def blocks(stage):
    return list(pack(ITEMS[stage], range(8), row_length=96, rows=1, layout="shared"))


@cache
def accumulated(stage):
    """Means under their metric names and the gradient of a step of all items."""
    gradient = programs(stage).zeros(params())

    def call(*block):
        nonlocal gradient
        gradient, sums = programs(stage).accumulate(params(), gradient, *block)
        return sums

    reference = SEGMENTS if stage == "srpo" else None
    mesh = meshes.make_mesh()
    with jax.set_mesh(mesh):
        sums = loop.run_blocks(mesh, stage, blocks(stage), reference, call)
    return loop.summarise(stage, jax.device_get(sums)), gradient


@cache
def expected():
    """Per pair: summed log-probs [n, 2] of the policy, in float64."""
    return np.array([tiny.item_logps(params(), item) for item in ITEMS["srpo"]])


def test_the_warmup_loss_is_the_weighted_mean_over_scored_tokens():
    means, _ = accumulated("rw")
    sums = np.array([tiny.item_logps(params(), item)[0] for item in ITEMS["rw"]])
    weights = np.array([item.weight for item in ITEMS["rw"]])
    scored = np.array([item.branches[0].scored.sum() for item in ITEMS["rw"]])
    assert means["loss"] == pytest.approx(-(weights * sums).sum() / (weights * scored).sum(), 1e-5)
    assert set(means) == {"loss", "mean_token_accuracy", "entropy"}
    assert 0 < means["entropy"] < np.log(tiny.CONFIG["vocab_size"])


def test_the_preference_loss_is_the_weighted_mean_over_pairs():
    means, _ = accumulated("srpo")
    ratios = BETA * (expected() - REFERENCE)
    margins = ratios[:, 0] - ratios[:, 1]
    weights = np.array([item.weight for item in ITEMS["srpo"]])
    loss = (weights * np.log1p(np.exp(-margins))).sum() / weights.sum()
    wanted = {
        "loss": loss,
        "rewards/chosen": ratios[:, 0].mean(),
        "rewards/rejected": ratios[:, 1].mean(),
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/chosen": expected()[:, 0].mean(),
        "logps/rejected": expected()[:, 1].mean(),
    }
    assert set(means) == {*wanted, "mean_token_accuracy"}
    for name, value in wanted.items():
        assert means[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert 0 < means["rewards/accuracies"] < 1, "the numbers above say something"


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_the_gradient_is_that_of_the_loss(stage):
    _, gradient = accumulated(stage)
    rng = np.random.default_rng(3)
    direction = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params()
    )
    slope = sum(
        float(jnp.vdot(a, b))
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    reference = SEGMENTS if stage == "srpo" else None
    mesh, ends = meshes.make_mesh(), []
    for sign in (1e-4, -1e-4):
        moved = jax.tree.map(lambda x, d, s=sign: x + s * d, params(), direction)
        found = loop.evaluate(programs(stage), mesh, stage, moved, blocks(stage), reference)
        ends.append(found["eval_loss"])
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=2e-2, abs=1e-2)
    assert abs(slope) > 0.05


@pytest.mark.parametrize("stage", ["rw", "srpo"])
def test_evaluation_gives_the_means_of_the_step(stage):
    means, _ = accumulated(stage)
    reference = SEGMENTS if stage == "srpo" else None
    found = loop.evaluate(
        programs(stage), meshes.make_mesh(), stage, params(), blocks(stage), reference
    )
    assert found.keys() == {f"eval_{name}" for name in means}
    for name, value in means.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_an_update_takes_one_step_down_the_gradient():
    _, gradient = accumulated("rw")
    state = step.State(jnp.asarray(4, jnp.int32), params(), optax.sgd(0.5).init(params()))
    new, norm = programs("rw").update(step.owned(state), gradient)
    assert int(new.step) == 5
    for x, g, y in zip(*map(jax.tree.leaves, (params(), gradient, new.params)), strict=True):
        np.testing.assert_allclose(y, np.asarray(x) - 0.5 * np.asarray(g), rtol=0, atol=1e-6)
    squares = sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient))
    assert float(norm["grad_norm"]) == pytest.approx(np.sqrt(squares), rel=1e-5)


def test_gradients_are_summed_in_float32_whatever_the_parameters_are():
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    for leaf in jax.tree.leaves(programs("rw").zeros(small)):
        assert leaf.dtype == jnp.float32 and not np.asarray(leaf).any()


def test_owned_copies():
    state = step.State(jnp.asarray(1, jnp.int32), {"w": jnp.arange(3.0)}, ())
    copy = step.owned(state)
    np.testing.assert_array_equal(copy.params["w"], state.params["w"])
    assert copy.params["w"].unsafe_buffer_pointer() != state.params["w"].unsafe_buffer_pointer()


def test_the_total_of_a_step_is_its_weight():
    for stage in ("rw", "srpo"):
        scored = [
            sum(b.scored[int(len(item.prefix) == 0) :].sum() for b in item.branches)
            for item in ITEMS[stage]
        ]
        weights = [item.weight for item in ITEMS[stage]]
        counts = scored if stage == "rw" else [1] * 8
        assert loop.step_total(stage, blocks(stage)) == np.dot(weights, counts)
        assert loop.step_total(stage, blocks(stage), ITEMS[stage]) == np.dot(weights, counts)


def test_a_step_without_weight_is_refused():
    items = [tiny.item(0, 3, 2, 2, weight=0.0)]
    empty = list(pack(items, [0], row_length=32, rows=1, layout="shared"))
    with pytest.raises(ValueError, match="a step has no weight"):
        loop.run_blocks(meshes.make_mesh(), "srpo", empty, None, lambda *_: None)


def test_references_go_to_their_slots_and_empty_slots_are_zero():
    (block, *_) = pack(ITEMS["srpo"], [5, 2], row_length=128, rows=2, layout="shared")
    found = loop.reference_of(block, SEGMENTS)
    assert found.shape == (*block.item.shape, 2, 4) and found.dtype == np.float32
    for index, values in zip(block.item.ravel(), found.reshape(-1, 2, 4), strict=True):
        np.testing.assert_array_equal(values, SEGMENTS[index] if index >= 0 else 0)
    assert not loop.reference_of(block, None).any()


def test_tokens_are_counted_as_separate_sequences():
    assert loop.sequence_tokens(tiny.item(0, 5, 3, 4)) == 17
    assert loop.sequence_tokens(tiny.item(0, 0, 9)) == 9


@pytest.mark.parametrize("stage", [pytest.param("rw", marks=pytest.mark.slow), "srpo"])
def test_a_step_of_one_block_is_one_program_with_the_same_result(stage):
    (block,) = pack(ITEMS[stage], range(8), row_length=256, rows=4, layout="shared")
    mesh, transform = meshes.make_mesh(devices=jax.devices()[:1]), optax.sgd(0.5)
    reference = SEGMENTS if stage == "srpo" else None
    made = programs(stage)

    def in_two(state, *arguments):
        gradient, sums = made.accumulate(state.params, made.zeros(state.params), *arguments)
        return *made.update(state, gradient), sums

    results = []
    for run in (made.whole, in_two):
        with jax.set_mesh(mesh):
            copy = jax.tree.map(lambda x: x + 0, params())
            state = step.init_state(transform, copy, mesh)

            def call(*arguments, run=run, state=state):
                return run(state, *arguments)

            (result,) = loop.run_blocks(mesh, stage, [block], reference, call)
        results.append(jax.device_get(result))
    one, two = map(jax.tree.leaves, results)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
