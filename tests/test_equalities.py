"""Equalities that the layout of rows, of memory and of devices must leave alone, in float32.

Legend: B rows, S scored positions of a row, P item slots of a row, K branches of an item.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file

from saro_jax import train
from saro_jax.config import Config
from saro_jax.data.packing import Rows, Shape, arrange, pack
from saro_jax.parallel import mesh as meshes
from saro_jax.training import loop, step, trainable
from saro_jax.training.scoring import make_scorer, put, score_items, score_tokens, sum_sequences

ITEMS = {kind: tiny.items(kind) for kind in ("sft", "preference")}
BRANCHES = {"sft": 1, "preference": 2}
# A factor a branch: a gradient that a wrong sign or a swapped branch would change.
FACTORS = np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)


@cache
def params():
    tiny.folder()  # the cache of compiled programs
    return tiny.params()


@cache
def scorer(branches=2, remat="none"):
    mesh = meshes.make_mesh()
    return make_scorer(tiny.ARCH, mesh, dtype=jnp.float32, remat=remat, branches=branches)


def scores(items, groups=None, row_length=192, rows=2, layout="shared", buckets=1):
    """Summed log-probs [n, K]; `groups` of items are packed together, by default all of them."""
    groups = [range(len(items))] if groups is None else groups
    shape = Shape(row_length, rows, layout, buckets)
    found = {
        i: logp.sum(-1)
        for i, logp, _ in score_items(
            scorer(len(items[0].branches)),
            params(),
            items,
            [arrange(items, group, shape) for group in groups],
            shape,
        )
    }
    return np.array([found[i] for i in range(len(items))])


@cache
def gradient_program(branches, remat):
    def total(tree, rows, factor_BPK):
        logp = score_tokens(tiny.ARCH, tree, rows, dtype=jnp.float32, remat=remat).logp
        sums = sum_sequences(logp, rows, branches).logp.sum(-1)
        return jnp.sum(jnp.where(rows.item[..., None] >= 0, sums * factor_BPK, 0.0))

    return jax.jit(jax.value_and_grad(total))


def gradients(kind, groups, row_length=192, rows=2, layout="shared", remat="none"):
    """Value and gradient of sum(factor * log-prob) over all branches."""
    K = BRANCHES[kind]
    value, summed = 0.0, jax.tree.map(jnp.zeros_like, params())
    for group in groups:
        for block in pack(ITEMS[kind], group, row_length=row_length, rows=rows, layout=layout):
            factors = FACTORS[block.item][..., :K]
            one, gradient = gradient_program(K, remat)(params(), block, factors)
            value, summed = value + one, jax.tree.map(jnp.add, summed, gradient)
    return value, summed


def close(a, b, tolerance=1e-5):
    """Trees whose leaves differ by at most `tolerance` of the leaf's largest entry."""
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        assert np.isfinite(x).all() and np.abs(x).max() > 0, path
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(x).max(), err_msg=path)


ALL, ALONE = [range(8)], [[i] for i in range(8)]


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_packed_rows_give_the_log_probs_of_single_sequences(kind):
    expected = np.array([tiny.item_logps(params(), item) for item in ITEMS[kind]])
    np.testing.assert_allclose(scores(ITEMS[kind]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_packed_equals_padded_separately_with_gradients(kind):
    packed, padded = gradients(kind, ALL), gradients(kind, ALONE)
    np.testing.assert_allclose(packed[0], padded[0], rtol=0, atol=1e-4)
    close(packed[1], padded[1])


def test_a_shared_prefix_equals_separate_rows_with_gradients():
    items = ITEMS["preference"]
    np.testing.assert_allclose(scores(items), scores(items, layout="separate"), rtol=0, atol=1e-4)
    shared, separate = gradients("preference", ALL), gradients("preference", ALL, layout="separate")
    np.testing.assert_allclose(shared[0], separate[0], rtol=0, atol=1e-4)
    close(shared[1], separate[1])


@pytest.mark.parametrize("changed", [0, 1])
def test_other_tokens_in_one_branch_leave_the_other_alone(changed):
    items = ITEMS["preference"]
    other = 1 - changed

    def shift(item):
        branches = list(item.branches)
        branches[changed] = replace(branches[changed], ids=(branches[changed].ids + 7) % 300)
        return replace(item, branches=tuple(branches))

    before, after = scores(items), scores([shift(item) for item in items])
    np.testing.assert_array_equal(before[:, other], after[:, other])
    assert (before[:, changed] != after[:, changed]).all()


def test_other_items_of_the_row_do_not_matter():
    items = ITEMS["preference"]
    others = [
        tiny.item(90 + i, len(x.prefix), *(len(b.ids) for b in x.branches))
        for i, x in enumerate(items)
    ]
    before, after = scores(items), scores([*items[:3], *others[3:]])
    np.testing.assert_array_equal(before[:3], after[:3])
    assert (before[3:] != after[3:]).all()


def test_the_place_in_the_row_and_its_length_do_not_matter():
    items = ITEMS["preference"]
    alone = scores(items, ALONE)
    for row_length, groups in ((192, ALL), (300, ALL), (300, [range(7, -1, -1)])):
        found = scores(items, groups, row_length)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-4)
    in_short_rows = scores(items, ALONE, buckets=3)
    np.testing.assert_allclose(in_short_rows, alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_recomputing_activations_changes_nothing(remat):
    plain, again = gradients("preference", ALL), gradients("preference", ALL, remat=remat)
    np.testing.assert_allclose(plain[0], again[0], rtol=0, atol=1e-4)
    close(plain[1], again[1])


def config_of(**lora):
    parts = {"data": {"train": "x"}, "model": {"dtype": "float32", "remat": "none"}, "lora": lora}
    return Config.model_validate(parts)


@cache
def programs_of(stage, rank=0):
    return step.programs(tiny.ARCH, config_of(rank=rank), stage, optax.identity())


@pytest.mark.parametrize(
    ("stage", "kind", "rank"),
    [("rw", "sft", 0), ("srpo", "preference", 0), ("srpo", "preference", 4)],
)
def test_accumulated_blocks_equal_one_block(stage, kind, rank):
    programs = programs_of(stage, rank)
    mesh = meshes.make_mesh()
    given = tiny.segments(FACTORS - 40.0) if stage == "srpo" else None
    trained, frozen = trainable.start(tiny.ARCH, config_of(rank=rank), params(), mesh)
    if rank:  # a B that is not 0, for A to have a gradient
        trained = jax.tree.map(lambda x: x + 0.05, trained)

    def whole_step(rows):
        blocks = list(pack(ITEMS[kind], range(8), row_length=96, rows=rows, layout="shared"))
        gradients = loop.Gradients(programs, trained, frozen)
        sums = loop.run_blocks(mesh, stage, blocks, given, gradients.add)
        return len(blocks), loop.summarise(stage, jax.device_get(sums)), gradients.sum

    with jax.set_mesh(mesh):
        many, many_means, many_gradient = whole_step(1)
        one, one_means, one_gradient = whole_step(8)
    assert (many > 2, one) == (True, 1)
    close(many_gradient, one_gradient)
    assert many_means.keys() == one_means.keys()
    for name, value in many_means.items():
        np.testing.assert_allclose(value, one_means[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("stage", "kind"), [("rw", "sft"), ("srpo", "preference")])
def test_a_block_without_scored_tokens_is_finite_and_has_no_gradient(stage, kind):
    programs = programs_of(stage)
    block = next(pack(ITEMS[kind], [0], row_length=96, rows=1, layout="shared"))
    empty = {name: np.zeros_like(x) for name, x in block._asdict().items()}
    masked = block._replace(valid=np.zeros_like(block.valid))
    mesh = meshes.make_mesh()
    for rows in (Rows(**empty | {"item": block.item * 0 - 1}), masked):
        (given,) = loop.run_blocks(mesh, "srpo", [block], None, lambda _, given, __: given)
        with jax.set_mesh(mesh):
            gradient, sums = programs.accumulate(
                params(),
                programs.zeros(params()),
                put(mesh, rows),
                given,
                np.float32(1),
            )
        assert all(np.isfinite(x).all() for x in sums.values())
        for leaf in jax.tree.leaves(gradient):
            assert not np.asarray(leaf).any()


@pytest.fixture
def optimized():
    """Programs as a user's run has them: what is fused decides how bfloat16 is rounded."""
    tiny.folder()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def check_step_0(dtype, out, monkeypatch, *overrides):
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)
    options = (f"--model.dtype={dtype}", f"--srpo.reference_cache={out / 'reference'}")
    arguments = tiny.arguments("srpo", out / "out", *options, "--train.steps=1", *overrides)
    assert train.main(arguments) == 0
    (record,) = tiny.metrics(out / "out")
    assert abs(record["loss"] - np.log(2)) <= 1e-6
    return [record[f"rewards/{name}"] for name in ("margins", "chosen", "rejected", "accuracies")]


@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_at_step_0_the_policy_is_the_reference(layout, tmp_path, monkeypatch):
    tiny.folder()
    *rewards, _ = check_step_0("float32", tmp_path, monkeypatch, f"--srpo.layout={layout}")
    assert max(map(abs, rewards)) <= 1e-6


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("shared",), marks=pytest.mark.slow),
        pytest.param(("separate",), marks=pytest.mark.slow),
        ("shared", "--lora.rank=4"),
    ],
)
def test_at_step_0_bfloat16_is_the_reference_exactly(options, tmp_path, monkeypatch):
    # The reference is scored on the very rows of the step; every pair is a tie.
    layout, *more = options
    found = check_step_0("bfloat16", tmp_path, monkeypatch, f"--srpo.layout={layout}", *more)
    assert found == [0.0, 0.0, 0.0, 0.5]


SHARDED = """
import json, shutil, sys
from pathlib import Path
import jax
import tiny
from saro_jax import train
from saro_jax.parallel import sharding
from saro_jax.training import loop

arguments, run, specs = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
train.huggingface.logits_match = lambda *_: None
assert jax.device_count() == 8
found = {}

def note(what, tree, mesh):
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = sharding.path_name(path)
        spec = sharding.spec(name, leaf.shape, mesh.shape)
        expected = jax.sharding.NamedSharding(mesh, spec)
        part = leaf.sharding.shard_shape(leaf.shape)
        if part != expected.shard_shape(leaf.shape):
            found[f"{what} {name}"] = [list(leaf.shape), list(part), str(spec)]

fit = loop.fit

def watched(**arguments):
    programs, mesh = arguments["programs"], arguments["mesh"]

    def zeros(params):
        gradients = programs.zeros(params)
        note("zeros", gradients, mesh)
        return gradients

    def accumulate(params, gradients, *rest):
        note("used", params, mesh)
        note("frozen", rest[3], mesh)
        gradients, sums = programs.accumulate(params, gradients, *rest)
        note("gradient", gradients, mesh)
        return gradients, sums

    arguments["programs"] = programs._replace(zeros=zeros, accumulate=accumulate)
    state, stopped = fit(**arguments)
    note("updated", state.params, mesh)
    note("moments", state.optimizer, mesh)
    return state, stopped

loop.fit = watched
assert train.main(arguments) == 0
# From the checkpoint of step 1 again.
shutil.rmtree(run / "model")
shutil.rmtree(run / "checkpoints" / "2")
assert train.main(arguments) == 0
specs.write_text(json.dumps(found))
"""


@pytest.mark.slow  # test_sharded compares single steps, test_multihost a run of two processes
@pytest.mark.parametrize(
    ("axes", "more"),
    [
        (("data", "fsdp", "tensor"), ()),
        (
            ("fsdp", "sequence", "tensor"),
            ("--lora.rank=4", "--lora.targets=all", "--train.freeze=mlp"),
        ),
    ],
)
def test_sharded_over_eight_devices_equals_one_device(axes, more, tmp_path, monkeypatch):
    tiny.folder()
    monkeypatch.setattr(train.huggingface, "logits_match", lambda *_: None)
    one, eight, specs = tmp_path / "one", tmp_path / "eight", tmp_path / "specs.json"
    # A large eps: Adam turns rounding errors of a gradient near 0 into whole steps.
    options = ("--train.micro_rows=4", "--optimizer.eps=1e-3", "--train.save_every=1", *more)
    assert train.main(tiny.arguments("srpo", one, *options)) == 0
    mesh = (
        *(f"--mesh.{axis}=2" for axis in axes),
        f"--srpo.reference_cache={tmp_path / 'reference'}",
    )
    arguments = json.dumps(tiny.arguments("srpo", eight, *options, *mesh))
    child = subprocess.run(
        [sys.executable, "-c", SHARDED, arguments, str(eight), str(specs)],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    assert "continuing from step 1 of 2" in child.stdout
    # The partitioner says so where it has to gather activations whole.
    assert "Involuntary full rematerialization" not in child.stderr, child.stderr[:2000]
    assert json.loads(specs.read_text()) == {}, "arrays that do not lie where the table says"
    for a, b in zip(tiny.metrics(one), tiny.metrics(eight), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            # Rounding breaks the ties of step 0; null is a step without pairs of the kind.
            if not name.endswith("rewards/accuracies") or a["step"] > 1:
                x, y = np.array([value, b[name]], float)
                np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5, err_msg=name)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (one, eight))
    start = load_file(tiny.folder() / "model" / "model.safetensors")
    for name, value in a.items():
        np.testing.assert_allclose(value, b[name], rtol=0, atol=1e-5, err_msg=name)
        before = start.get(name, start["model.embed_tokens.weight"])  # an untied lm_head
        assert np.abs(value - before).max() > 1e-4, name
