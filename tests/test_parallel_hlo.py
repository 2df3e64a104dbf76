"""The walk of compiled programs, on small ones whose operations and bytes are known."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from test_parallel_topologies import NEEDS_LIBTPU

from saro_jax.parallel import hlo, hlo_costs, hlo_walk, schedule, topologies

F32 = jnp.float32


def text(run, *shapes) -> Any:
    return jax.jit(run).lower(*(jax.ShapeDtypeStruct(s, F32) for s in shapes)).compile().as_text()


def totals(run, *shapes, **options) -> hlo_walk.Totals:
    return hlo_walk.totals(hlo.parse(text(run, *shapes)), **options)


def test_a_product():
    assert totals(lambda a, b: a @ b, (64, 32), (32, 128)).flops == 2 * 64 * 32 * 128


def test_batched_products():
    found = totals(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (5, 64, 32), (5, 32, 16))
    assert found.flops == 2 * 5 * 64 * 32 * 16


def stack(x, w):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_loop_counts_as_often_as_it_runs():
    assert totals(stack, (64, 32), (7, 32, 32)).flops == 7 * 2 * 64 * 32 * 32


def test_loops_in_loops():
    def run(x, w):
        return lax.fori_loop(0, 5, lambda _, x: stack(x, w), x)

    assert totals(run, (64, 32), (3, 32, 32)).flops == 5 * 3 * 2 * 64 * 32 * 32


def test_a_loop_that_data_decide_is_named_and_can_be_told():
    def run(x, n):
        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ state[1])

        with jax.named_scope("guess"):
            return lax.while_loop(lambda s: s[0] < n[0].astype(jnp.int32), body, (0, x))[1]

    once = totals(run, (64, 64), (1,))
    assert once.flops == 2 * 64**3
    assert len(once.unknown_loops) == 1 and "guess" in once.unknown_loops[0]
    told = totals(run, (64, 64), (1,), loops={"guess": 9})
    assert (told.flops, told.unknown_loops) == (9 * 2 * 64**3, [])


def test_of_branches_the_largest_counts():
    def run(x, n):
        branches = [lambda x: x @ x, lambda x: x @ x @ x, lambda x: x]
        return lax.switch(n[0].astype(jnp.int32), branches, x)

    assert totals(run, (64, 64), (1,)).flops == 2 * 2 * 64**3


def test_bytes_of_an_update_are_those_of_the_part():
    def run(x, part):
        return lax.fori_loop(
            0, 8, lambda i, x: lax.dynamic_update_slice(x, part, (i * 128, i * 0)), x
        )

    found = totals(run, (1024, 256), (128, 256))
    part = 128 * 256 * 4
    assert 8 * 2 * part <= found.hbm_bytes <= 8 * 3 * part + 3 * 1024 * 256 * 4


# A TPU program in small: no note of the trip count, a padded window for a batched product, memory
# of the chip itself (S(1)), an asynchronous collective and one that is repeated in a fusion.
TPU = """HloModule jit_run, is_scheduled=true

%inside (p.1: f32[8,128], p.2: f32[16,8,128], p.3: s32[]) -> f32[8,128] {
  %p.1 = f32[8,128]{1,0} parameter(0)
  %p.2 = f32[16,8,128]{2,1,0} parameter(1)
  %p.3 = s32[] parameter(2)
  %z = s32[] constant(0)
  %d = f32[1,8,128]{2,1,0} dynamic-slice(%p.2, %p.3, %z, %z), dynamic_slice_sizes={1,8,128}
  %b = f32[8,128]{1,0} bitcast(%d)
  ROOT %a = f32[8,128]{1,0} add(%p.1, %b)
}

%condition (s: (s32[], f32[8,128], f32[16,8,128])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/f32[16,8,128]{2,1,0}) parameter(0)
  %n = s32[] constant(8)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[8,128], f32[16,8,128])) -> (s32[], f32[8,128], f32[16,8,128]) {
  %s = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, f32[16,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%s), index=1
  %w = f32[16,8,128]{2,1,0} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %g = (f32[2,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %fusion.1 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x, %w, %i), kind=kLoop, calls=%inside
  %done = f32[8,128]{1,0} all-gather-done(%g)
  ROOT %t = (s32[], f32[8,128], f32[16,8,128]) tuple(%next, %done, %w)
}

ENTRY %main (x: f32[8,128], w: f32[16,8,128], k: f32[4,8,16]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %w = f32[16,8,128]{2,1,0} parameter(1)
  %k = f32[4,8,16]{2,1,0} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], f32[8,128], f32[16,8,128]) tuple(%zero, %x, %w)
  %loop = (s32[], f32[8,128], f32[16,8,128]) while(%start), condition=%condition, body=%body
  %pad = f32[7,8,8]{2,1,0} convolution(%k, %k), WINDOW, dim_labels=0bf_0oi->0bf
  %kernel = f32[8,128]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={
"note":"{\\"blocks\\": 512}"
}}, backend_config={}
  %r = f32[8,128]{1,0} all-reduce(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, to_apply=%inside
  ROOT %out = f32[8,128]{1,0} get-tuple-element(%loop), index=1
}
""".replace("WINDOW", "window={size=4 stride=1 pad=3_3 rhs_reversal=1}")


def test_a_tpu_program_in_text():
    found = hlo_walk.totals(hlo.parse(TPU), slice_devices=2)
    assert found.unknown_loops == []
    # Every element of one operand meets every one of the other once; padding meets nothing.
    assert found.flops == 2 * 8 * 8 * 16 * (4 * 4)
    array = 8 * 128 * 4
    gather, reduce = found.collectives
    assert (gather.kind, gather.count, gather.devices, gather.overlapped) == (
        "all-gather", 4.0, 4, True,
    )  # fmt: skip
    assert gather.bytes == 4 * array
    assert (reduce.kind, reduce.bytes, reduce.devices, reduce.overlapped) == (
        "all-reduce", array, 4, False,
    )  # fmt: skip
    assert gather.slices and reduce.slices  # groups of four over slices of two
    # In each trip the fusion reads x and one slice of w; its result is in the chip's own memory.
    module = hlo.parse(TPU)
    fusion = module.computations["body"]["fusion.1"]
    assert hlo_costs.hbm_bytes(module, "body", fusion) == 2 * array + 4


NESTED = """HloModule jit_cache

%cut (p.0: f32[64,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[64,8,128]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,8,128]{2,1,0} dynamic-slice(%p.0, %p.1, %z, %z), dynamic_slice_sizes={1,8,128}
  ROOT %b = f32[8,128]{1,0} bitcast(%d)
}

%outer (q.0: f32[8,8], q.1: f32[64,8,128], q.2: s32[]) -> f32[8,128] {
  %q.0 = f32[8,8]{1,0} parameter(0)
  %q.1 = f32[64,8,128]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %part = f32[8,128]{1,0} fusion(%q.1, %q.2), kind=kLoop, calls=%cut
  ROOT %dot = f32[8,128]{1,0} dot(%q.0, %part), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (c: f32[512,128], at: s32[4,1], new: f32[4,128]) -> f32[512,128] {
  %c = f32[512,128]{1,0} parameter(0)
  %at = s32[4,1]{1,0} parameter(1)
  %new = f32[4,128]{1,0} parameter(2)
  ROOT %s = f32[512,128]{1,0} scatter(%c, %at, %new), to_apply=%cut
}

ENTRY %main (q: f32[8,8], w: f32[64,8,128], i: s32[], c: f32[512,128], at: s32[4,1]) -> f32[8,128] {
  %q = f32[8,8]{1,0} parameter(0)
  %w = f32[64,8,128]{2,1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = f32[512,128]{1,0} parameter(3)
  %at = s32[4,1]{1,0} parameter(4)
  %new = f32[4,128]{1,0} constant({...})
  %f = f32[8,128]{1,0} fusion(%q, %w, %i), kind=kOutput, calls=%outer
  ROOT %g = f32[512,128]{1,0} fusion(%c, %at, %new), kind=kLoop, calls=%put
}
"""


def test_a_layer_cut_from_the_stack_and_a_cache_written_in_place_count_by_the_part():
    module = hlo.parse(NESTED)
    main = module.computations["main"]
    assert hlo_costs.hbm_bytes(module, "main", main["f"]) == 4 * (8 * 8 + 2 * 8 * 128 + 1)
    assert hlo_costs.hbm_bytes(module, "main", main["g"]) == 4 * (4 + 3 * 4 * 128)


def test_groups():
    def groups(attributes: str, size: int = 1 << 30):
        one = hlo.Instruction("x", "f32[]", "all-reduce", (), "", attributes, False)
        return hlo_costs.group_of(one, size)

    assert groups("replica_groups={{0,1},{2,3}}", 2) == (2, False)
    assert groups("replica_groups={{0,2},{1,3}}", 2) == (2, True)
    assert groups("replica_groups=[2,4]<=[8], x") == (4, False)
    assert groups("replica_groups=[4,2]<=[2,4]T(1,0), x", 4) == (2, True)
    assert groups("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", 4) == (4, False)
    assert groups("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", 4) == (2, True)
    assert groups("source_target_pairs={{0,1},{1,0}}, x", 1) == (2, True)


CHILD = """
import jax, jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec as P
from saro_jax.parallel import hlo, hlo_walk
mesh = Mesh(jax.devices(), ("x",))
def layer(x, w):
    return jnp.tanh(x @ lax.all_gather(w, "x", axis=0, tiled=True)), None
def run(x, w):
    y = lax.scan(layer, x, w)[0]
    return lax.psum((y * y).sum(), "x")
step = jax.shard_map(run, mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P())
shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((32, 64), (6, 64, 64))]
found = hlo_walk.totals(hlo.parse(jax.jit(step).lower(*shapes).compile().as_text()))
print(found.flops, found.by_kind())
assert found.flops == 6 * 2 * 8 * 64 * 64
kinds = {one.kind: one for one in found.collectives}
assert kinds["all-gather"].bytes == 64 * 64 * 4 and kinds["all-gather"].count == 6
assert kinds["all-gather"].devices == 4 and kinds["all-reduce"].bytes == 4
"""


def test_a_gather_in_a_loop_over_four_devices():
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("HloModule nothing\n")


def test_wire_seconds():
    chip = topologies.CHIPS["v5p"]

    def seconds(kind: str, devices: int = 4, slices: bool = False) -> float:
        one = hlo_costs.Collective(kind, 1800_000_000, 1.0, devices, False, slices, "")
        return schedule.wire_seconds(one, chip) - schedule.LATENCY

    assert seconds("all-gather") == pytest.approx(0.0075)
    assert seconds("all-reduce") == pytest.approx(0.015)
    assert seconds("collective-permute") == pytest.approx(0.02)
    assert seconds("all-gather", slices=True) == pytest.approx(0.75 * 1.8 / 6.25)


def test_the_schedule_hides_what_overlaps():
    chip = topologies.CHIPS["v5e"]
    found = schedule.estimate(hlo.parse(TPU), chip)
    synchronous = TPU.replace("all-gather-start", "all-gather").replace(
        "(f32[2,128]{1,0}, f32[8,128]{1,0}) all", "f32[8,128]{1,0} all"
    )
    assert found.total < schedule.estimate(hlo.parse(synchronous), chip).total
    assert found.binding() in ("compute", "memory", "network")


@NEEDS_LIBTPU
def test_on_a_real_tpu_program():
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = topologies.devices(topologies.find("v5e-4"))
    mesh = Mesh(devices, ("x",))

    def layer(x, w):
        return jnp.tanh(x @ lax.all_gather(w, "x", axis=0, tiled=True)), None

    def run(x, w):
        return lax.scan(layer, x, w)[0]

    step = jax.shard_map(run, mesh=mesh, in_specs=(P("x"), P(None, "x")), out_specs=P("x"))
    x = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
    w = jax.ShapeDtypeStruct(
        (6, 256, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "x"))
    )
    compiled: Any = jax.jit(step).lower(x, w).compile()
    found = hlo_walk.totals(hlo.parse(compiled.as_text()))
    assert found.unknown_loops == []
    assert found.flops == 6 * 2 * 128 * 256 * 256
    gathered = sum(one.bytes * one.count for one in found.collectives if one.kind == "all-gather")
    assert gathered == pytest.approx(6 * 256 * 256 * 2, rel=0.01)
