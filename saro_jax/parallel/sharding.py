"""Where each array lies: one table for parameters and optimizer moments, one rule for rows."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# What the devices of each group of axes share out (parallel/mesh.py says what the axes are).
ROWS = ("slice", "data", "fsdp")  # the rows of a batch
TOKENS = (*ROWS, "sequence")  # its scored tokens
SHARDS = ("fsdp", "sequence")  # the weights, beside "tensor": gathered where they are used
WIDE = ("tensor", *SHARDS)
HEADS = ("tensor", "sequence")  # attention's heads: each device sees whole rows of some heads

HOST = "pinned_host"  # the kind of memory

# First match wins, on the path of the leaf joined with "/". Layers are stacked on axis 0. Optimizer
# moments carry the parameter's path as a suffix, so the same rules serve them.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed_tokens|lm_head)/weight$", P("tensor", SHARDS)),
    (r"layers/.*(q_proj|k_proj|v_proj)/weight$", P(None, SHARDS, "tensor")),
    (r"layers/.*o_proj/weight$", P(None, "tensor", SHARDS)),
    # The wide axis of the MLP takes all cuts: gathered piece by piece, a piece of gate and up then
    # is a piece of the result; one of the other axis would be added to all of it, in float32.
    (r"layers/.*(gate_proj|up_proj)/weight$", P(None, None, WIDE)),
    (r"layers/.*down_proj/weight$", P(None, WIDE, None)),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", P(None, "tensor")),
    (r"layers/.*(o_proj|down_proj)/bias$", P()),
    # Adapters are cut like the matrix they stand beside; their rank never is. A of o_proj and
    # down_proj is cut where its input is, so what crosses the devices is [tokens, rank].
    (r"layers/.*(q_proj|k_proj|v_proj)/lora_A$", P(None, SHARDS, None)),
    (r"layers/.*(q_proj|k_proj|v_proj)/lora_B$", P(None, None, "tensor")),
    (r"layers/.*o_proj/lora_A$", P(None, "tensor", None)),
    (r"layers/.*o_proj/lora_B$", P(None, None, SHARDS)),
    (r"layers/.*(gate_proj|up_proj)/lora_A$", P(None, None, None)),
    (r"layers/.*(gate_proj|up_proj)/lora_B$", P(None, None, WIDE)),
    (r"layers/.*down_proj/lora_A$", P(None, WIDE, None)),
    (r"layers/.*down_proj/lora_B$", P(None, None, None)),
    (r"lm_head/lora_A$", P(SHARDS, None)),
    (r"lm_head/lora_B$", P(None, "tensor")),
    (r"norm/weight$", P()),
    (r"layernorm/weight$", P()),
)
# Where the vocabulary does not divide by mesh.tensor: a table's other axis takes all cuts, and its
# adapter is whole.
UNEVEN: tuple[tuple[str, P], ...] = (
    (r"(embed_tokens|lm_head)/weight$", P(None, (*SHARDS, "tensor"))),
    (r"lm_head/lora_B$", P()),
)


def path_name(path: tuple[Any, ...]) -> str:
    """'model/norm/weight' from a `jax.tree_util` key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def parts(sizes: Mapping[str, int], axes: Any) -> int:
    """Into how many parts the axes of one entry of a PartitionSpec (None, a name, names) cut."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(sizes.get(axis, 1) for axis in names)


def spec(name: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """PartitionSpec of one leaf on a mesh of `sizes`; scalars are replicated.

    A parameter without a rule is a ValueError, and so are sizes that do not divide its shape.
    """
    if not shape:
        return P()
    rule = _rule(RULES, name)
    if rule is None:
        raise ValueError(f"no sharding rule for parameter {name!r} of shape {shape}")
    uneven = _rule(UNEVEN, name)
    if uneven is not None and any(axes == "tensor" for axes, _ in _undivided(rule, shape, sizes)):
        rule = uneven
    for axes, size in _undivided(rule, shape, sizes):
        raise ValueError(f"{name} of shape {shape}: {size} does not divide by {_cut(sizes, axes)}")
    return rule


def check_heads(heads: int, sizes: Mapping[str, int]) -> None:
    """Refuse a mesh among whose devices the query heads do not divide; key heads are repeated."""
    if heads % parts(sizes, HEADS):
        raise ValueError(
            f"{_cut(sizes, HEADS)}: the model's {heads} attention heads do not divide by "
            f"{parts(sizes, HEADS)}"
        )


def _cut(sizes: Mapping[str, int], axes: Any) -> str:
    """'mesh.fsdp=2 x mesh.sequence=4': the axes that cut."""
    names = (axes,) if isinstance(axes, str) else axes
    return " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in names if sizes.get(axis, 1) > 1)


def _rule(rules: tuple[tuple[str, P], ...], name: str) -> P | None:
    return next((found for pattern, found in rules if re.search(pattern, name)), None)


def _undivided(rule: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> list[tuple[Any, int]]:
    """(axes, size) where the axes of `rule` do not divide the shape's size."""
    entries = zip(rule, shape, strict=False)
    return [(axes, size) for axes, size in entries if size % parts(sizes, axes)]


def shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of `tree` (arrays or `ShapeDtypeStruct`s), by `RULES`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh.shape)), tree
    )


def check_offload(mesh: Mesh) -> None:
    """Refuse to keep moments on a host whose memory the devices do not address."""
    device = mesh.local_mesh.devices.flat[0]
    kinds = {memory.kind for memory in device.addressable_memories()}
    if HOST not in kinds:
        raise ValueError(
            f"optimizer.offload=true: {device.device_kind} has no {HOST} memory, only "
            f"{', '.join(sorted(kinds))}; set it to false"
        )


def on_host(places: Any, shapes: Any) -> Any:
    """The shardings of a tree with its arrays in the host's memory; scalars stay."""
    return jax.tree.map(
        lambda place, leaf: place.with_memory_kind(HOST) if leaf.ndim else place, places, shapes
    )


def to_memory(tree: Any, space: Any) -> Any:
    """The arrays of a tree in a `jax.memory.Space`, Host or Device; scalars stay."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


def rows(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose axis 0 is the row of a batch."""
    return NamedSharding(mesh, P(ROWS))


def axis_parts(axes: Any) -> int:
    """Into how many parts `axes` cut on the mesh that is set; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else parts(mesh.shape, axes)


def constrain(x: jax.Array, partition: P) -> jax.Array:
    """x cut as `partition` says where a mesh is set, as it is without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return lax.with_sharding_constraint(x, partition)


def constrain_params(tree: Any) -> Any:
    """Keep a tree like the parameters (gradients) where `RULES` put it, if a mesh is set.

    Nothing else would cut a sum of gradients: XLA keeps a whole one on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: constrain(leaf, spec(path_name(path), leaf.shape, mesh.shape)), tree
    )


def whole_columns(table_VD: jax.Array) -> jax.Array:
    """The table with whole rows on every device of `SHARDS`, which looking rows up in it needs."""
    even = table_VD.shape[0] % axis_parts("tensor") == 0
    return constrain(table_VD, P("tensor" if even else None, None))


def row_axes(rows: int, axes: tuple[str, ...] = ROWS) -> tuple[str, ...] | None:
    """`axes` where a mesh is set and they cut `rows` rows evenly, else None."""
    empty = jax.sharding.get_abstract_mesh().empty
    return None if empty or rows % axis_parts(axes) else axes


def by_row(run: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`run` on each device's own rows, where a mesh is set: arrays whose axis 0 is the row.

    What picks by index within a row stays on the device then; the compiler would not know it.
    """

    def running(*arrays: jax.Array) -> jax.Array:
        rows = row_axes(arrays[0].shape[0])
        if rows is None:
            return run(*arrays)
        return jax.shard_map(run, in_specs=(P(rows),) * len(arrays), out_specs=P(rows))(*arrays)

    return running


def constrain_rows(x_BTD: jax.Array, columns: str | None = None) -> jax.Array:
    """Keep activations cut by row and token; XLA alone replicates the batch.

    columns: the axis that cuts D. A length that mesh.sequence does not divide (one token of
    decoding) is not cut.
    """
    even = x_BTD.shape[1] % axis_parts("sequence") == 0
    return constrain(x_BTD, P(ROWS, "sequence" if even else None, columns))


def constrain_heads(x_BTNH: jax.Array) -> jax.Array:
    """Whole rows of some heads on every device, which attention needs.

    From activations that are cut by token this is one all-to-all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        check_heads(x_BTNH.shape[2], mesh.shape)
    return constrain(x_BTNH, P(ROWS, None, HEADS, None))


def deal_tokens(x_BS: jax.Array) -> jax.Array:
    """[B, S] -> [B * n, S / n], the S positions of a row dealt out to its n = mesh.sequence shards.

    Every n-th position goes to the same shard, so that where the first positions of a row count,
    the first ones of each shard do. Axis 0 is then cut by `TOKENS`: a shard of rows holds the
    parts of its own rows only.
    """
    shards, n, (B, S) = axis_parts(ROWS), axis_parts("sequence"), x_BS.shape
    if n == 1:
        return x_BS
    x = x_BS.reshape(shards, B // shards, S // n, n).transpose(0, 3, 1, 2)
    return constrain(x.reshape(B * n, S // n), P(TOKENS))


def collect_tokens(x_RS: jax.Array) -> jax.Array:
    """What `deal_tokens` dealt out, [B * n, S / n], as [B, S]."""
    shards, n = axis_parts(ROWS), axis_parts("sequence")
    if n == 1:
        return x_RS
    x = x_RS.reshape(shards, n, len(x_RS) // (shards * n), -1).transpose(0, 2, 3, 1)
    return constrain(x.reshape(len(x_RS) // n, -1), P(ROWS))


def gather_tokens(x_BTD: jax.Array, source_BS: jax.Array) -> jax.Array:
    """x_BTD[b, source_BS[b, s]], [B, S, D]; the positions S as `deal_tokens` deals them out.

    The rows of x are gathered whole on the shards of their tokens: a position may come from
    anywhere in its row.
    """
    shards, n, (B, T, D) = axis_parts(ROWS), axis_parts("sequence"), x_BTD.shape
    if n == 1:
        return by_row(lambda x, at: jnp.take_along_axis(x, at[..., None], axis=1))(x_BTD, source_BS)
    x = constrain(x_BTD, P(ROWS)).reshape(shards, 1, B // shards, T, D)
    source = deal_tokens(source_BS).reshape(shards, n, B // shards, -1, 1)
    dealt = jnp.take_along_axis(x, source, axis=3)
    return constrain(dealt.reshape(B * n, -1, D), P(TOKENS))
