"""The fused kernels, their bodies run as XLA operations, against the blockwise path."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from saro_jax.config import Config
from saro_jax.models import attention, decoder, flash
from saro_jax.models.attention import Tokens, attend
from saro_jax.parallel import mesh as meshes
from saro_jax.parallel.sharding import HEADS, ROWS

FAR = 2**30
plan = jax.jit(flash.plan, static_argnums=2)


def random_tokens(rng: np.random.Generator, rows: int, length: int) -> Tokens:
    """Rows of items of 0 to 4 branches, now and then with padding between and only padding."""
    found = np.zeros((3, rows, length), np.int32)
    for row in range(rows):
        at, segment = 0, 0
        while at < length and rng.random() < 0.9:
            segment += 1
            prefix = int(rng.integers(0, 12))
            parts = [(0, 0, prefix)]
            parts += [
                (b + 1, prefix, int(rng.integers(1, 20))) for b in range(int(rng.integers(0, 5)))
            ]
            for branch, start, size in parts:
                size = min(size, length - at)
                here = slice(at, at + size)
                found[0, row, here], found[1, row, here] = segment, branch
                found[2, row, here] = start + np.arange(size)
                at += size
            at += int(rng.integers(0, 9)) * (rng.random() < 0.2)
    return Tokens(*(jnp.asarray(x) for x in found))


def visible(tokens: Tokens, window: int) -> np.ndarray:
    """The mask of the blockwise path, bool [B, T, T]."""
    zero = jnp.zeros((), jnp.int32)
    length = tokens.segment.shape[1]
    q, k = (attention._block_of(tokens, zero, length, axes) for axes in ((2,), (1,)))
    return np.asarray(attention._visible(q, k, jnp.asarray(window)))


@partial(jax.jit, static_argnames=("blocks", "softcap"))
def values_and_gradients(q, k, v, g, tokens, window, blocks, softcap):
    """Output and gradients, of the fused kernels or (blocks None) of the blockwise path."""

    def run(q, k, v):
        if blocks is None:
            return attend(q, k, v, tokens, window, 0.3, softcap, block=16, kernel="xla")
        return flash.attend(
            q, k, v, tokens, window, 0.3, softcap, blocks=flash.Blocks(*blocks), interpret=True
        )

    out, pull = jax.vjp(run, q, k, v)
    return out, *pull(g.astype(out.dtype))


CASES = [
    # T, N, K, H, blocks, softcap
    (53, 6, 2, 8, (8, 16), None),
    (64, 4, 4, 16, (16, 8), 2.0),
    (37, 4, 1, 8, (64, 64), 3.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_blockwise_path(case):
    T, N, K, H, blocks, softcap = case
    rng = np.random.default_rng(T)
    for window in (FAR, FAR, FAR, 9, 3, 1):
        tokens = random_tokens(rng, 3, T)
        draw = (rng.normal(size=(3, T, n, H)).astype(np.float32) for n in (N, K, K, N))
        arguments = (*draw, tokens, jnp.asarray(window, jnp.int32))
        got = values_and_gradients(*arguments, blocks, softcap)
        want = values_and_gradients(*arguments, None, softcap)
        for a, b, name in zip(got, want, ("out", "dq", "dk", "dv"), strict=True):
            tolerance = 1e-5 if name == "out" else 1e-4
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-5, err_msg=name)
        for one in got:
            padding = np.asarray(tokens.segment) == 0
            assert not np.any(np.asarray(one)[padding]), "padding is zero and gets no gradient"


def test_bfloat16_is_as_close_to_float32_as_the_blockwise_path():
    T, N, K, H = CASES[0][:4]
    rng = np.random.default_rng(7)
    tokens = random_tokens(rng, 3, T)
    draw = [rng.normal(size=(3, T, n, H)).astype(np.float32) for n in (N, K, K, N)]
    draw = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in draw]
    exact = values_and_gradients(*draw, tokens, jnp.asarray(FAR), None, None)
    half = [jnp.asarray(x, jnp.bfloat16) for x in draw]
    ours = values_and_gradients(*half, tokens, jnp.asarray(FAR), (8, 16), None)
    theirs = values_and_gradients(*half, tokens, jnp.asarray(FAR), None, None)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == jnp.bfloat16

        def error(x, want=want):
            return np.linalg.norm(np.asarray(x, np.float32) - want) / np.linalg.norm(want)

        assert error(got) < min(0.01, 1.2 * error(other))


@pytest.mark.parametrize("blocks", [(8, 16), (16, 8)])
def test_the_plan_has_every_visible_pair_and_masks_all_but_whole_ones(blocks):
    rng = np.random.default_rng(3)
    T, (bq, bk) = 96, blocks
    for window in (FAR, FAR, FAR, 11, 2):
        tokens = random_tokens(rng, 4, T)
        steps = plan(tokens, jnp.asarray(window, jnp.int32), flash.Blocks(*blocks))
        seen = visible(tokens, window).reshape(4, T // bq, bq, T // bk, bk)
        for row in range(4):
            live = np.asarray(steps.flags[row]) & flash.LIVE > 0
            assert live[: live.sum()].all() and live.sum() <= steps.count
            query, key = np.asarray(steps.query[row]), np.asarray(steps.key[row])
            assert (query[live.sum() :] == query[live.sum() - 1]).all(), "fetches nothing new"
            assert (key[live.sum() :] == key[live.sum() - 1]).all()
            query, key, flags = query[live], key[live], np.asarray(steps.flags[row])[live]
            pairs = list(zip(query.tolist(), key.tolist(), strict=True))
            assert pairs == sorted(set(pairs))
            wanted = np.argwhere(seen[row].any((1, 3)))
            assert {tuple(pair) for pair in wanted.tolist()} <= set(pairs)
            assert set(query.tolist()) == set(range(T // bq)), "every query gets an output"
            np.testing.assert_array_equal(flags & flash.FIRST > 0, np.diff(query, prepend=-1) != 0)
            np.testing.assert_array_equal(flags & flash.LAST > 0, np.diff(query, append=-1) != 0)
            for i, j, flag in zip(query, key, flags, strict=True):
                assert flag & flash.MASKED or seen[row, i, :, j].all()


def test_the_second_branch_skips_the_first():
    """[prefix 32][A 64][B 64] in blocks of 16: B computes 2 + (1 + 2 + 3 + 4) / 4 pairs a block."""
    sizes = [(0, 0, 32), (1, 32, 64), (2, 32, 64)]
    branch = np.concatenate([np.full(n, b) for b, _, n in sizes])[None]
    position = np.concatenate([s + np.arange(n) for _, s, n in sizes])[None]
    tokens = Tokens(*(jnp.asarray(x, jnp.int32) for x in (branch * 0 + 1, branch, position)))
    steps = plan(tokens, jnp.asarray(FAR), flash.Blocks(16, 16))
    assert steps.count == 3 + 2 * (4 * 2 + 10)
    masked = np.asarray(steps.flags)[0, :39] & flash.MASKED > 0
    assert masked.sum() == 10, "only the blocks on the diagonal"
    first = np.asarray(steps.query)[0] >= 6
    assert not (set(np.asarray(steps.key)[0][first].tolist()) & {2, 3, 4, 5})


def hidden(tree, tokens, where, kernel, remat="none"):
    return decoder.forward(tiny.ARCH, tree, tokens, where, attention=kernel, remat=remat)


def test_the_decoder_computes_the_same_and_dots_runs_the_kernel_once():
    rng = np.random.default_rng(11)
    tree, where = tiny.params(), random_tokens(rng, 2, 48)
    tokens = jnp.asarray(rng.integers(3, 300, (2, 48)), jnp.int32)
    real = (where.segment > 0)[..., None]

    def loss(tree, kernel, remat="none"):
        return jnp.sum(jnp.where(real, hidden(tree, tokens, where, kernel, remat), 0.0) ** 3)

    gradient = jax.grad(loss)
    for a, b in zip(
        *(
            jax.tree.leaves(jax.jit(gradient, static_argnums=1)(tree, k))
            for k in ("xla", "interpret")
        ),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(a).max()))
    for remat, runs in (("none", 1), ("dots", 1), ("full", 2)):
        program = jax.make_jaxpr(partial(gradient, kernel="interpret", remat=remat))(tree)
        found = kernels(program.jaxpr)
        assert (found.count("forward_kernel"), found.count("backward_kernel")) == (runs, 1), remat


def kernels(jaxpr: Any) -> list[str]:
    """Names of the kernels that a program calls, those of inner programs too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found.append(equation.params["name"])
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            found += kernels(inner) if hasattr(inner, "eqns") else []
    return found


def test_lowers_for_a_tpu():
    B, T = 2, 512
    for N, K, H, dtype in (
        (8, 2, 128, jnp.bfloat16),
        (9, 3, 64, jnp.bfloat16),
        (4, 4, 64, jnp.float32),
    ):
        shapes = [jax.ShapeDtypeStruct((B, T, n, H), dtype) for n in (N, K, K)]
        ids: Any = Tokens(*[jax.ShapeDtypeStruct((B, T), jnp.int32)] * 3)  # pyright: ignore

        def loss(q, k, v, tokens):
            return flash.attend(q, k, v, tokens, FAR, 0.1).astype(jnp.float32).sum()

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes, ids)
        assert traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize(
    ("length", "group", "blocks"),
    [(4096, 4, (256, 256)), (1152, 1, (128, 128)), (1280, 3, (256, 256)), (200, 7, (128, 256))],
)
def test_default_blocks(length, group, blocks):
    assert flash.default_blocks(length, group) == blocks


def test_refusals():
    with pytest.raises(ValueError, match=r"model\.attention=flash needs a TPU, this is a cpu"):
        attention.check_kernel("flash")
    for kernel in ("auto", "xla"):
        attention.check_kernel(kernel)
    config = Config.model_validate({"data": {"train": "x"}})
    assert config.model.attention == "auto"


def test_rows_too_long_for_fast_memory(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    assert attention._fused("auto", 4096, 128) and attention._fused("flash", 32768, 64)
    assert not attention._fused("xla", 4096, 128)
    assert not attention._fused("auto", 40000, 128)
    with pytest.raises(ValueError, match=r"up to 32768 tokens at a head width of 64, got 40000"):
        attention._fused("flash", 40000, 64)
    with pytest.raises(ValueError, match=r"up to 16384 tokens at a head width of 256, got 40000"):
        attention._fused("flash", 40000, 256)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
import test_models_flash as t
from saro_jax.parallel import mesh as meshes
rng = np.random.default_rng(5)
tokens = t.random_tokens(rng, 4, 24)
draw = [rng.normal(size=(4, 24, n, 8)).astype(np.float32) for n in (4, 2, 2, 4)]
arguments = (*draw, tokens, jnp.asarray(7, jnp.int32))
want = t.values_and_gradients(*arguments, None, 3.0)
with jax.set_mesh(meshes.make_mesh(2, 2, 2)):
    got = t.values_and_gradients(*arguments, (8, 8), 3.0)
for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
assert got[0].sharding.shard_shape(got[0].shape) == (1, 24, 2, 8)
"""


def test_what_does_not_divide_is_computed_whole():
    def shape(B, n):
        return jax.ShapeDtypeStruct((B, 16, n, 8), jnp.float32)

    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 2, 2, 1, 2), meshes.AXES)):
        assert flash._partitions(shape(4, 4), shape(4, 2))[0] == P(ROWS, None, HEADS, None)
        assert flash._partitions(shape(3, 6), shape(3, 3))[0] == P(None, None, None, None)
    assert flash._partitions(shape(3, 6), shape(3, 3))[1] == P(ROWS)


def child(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
    )


def test_sharded_equals_one_device():
    flags = "--xla_force_host_platform_device_count=8"
    ran = child("-c", SHARDED, XLA_FLAGS=flags)
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.slow
def test_compiles_for_tpus():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: pip install -e '.[tpu]'")
    script = Path(__file__).parents[1] / "benchmarks" / "flash_tpu.py"
    ran = child(str(script), "--quick")
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    assert "| v5e |" in ran.stdout and "| v5p |" in ran.stdout
