"""Where each array lies: one table for parameters and optimizer moments, one rule for rows."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# First match wins, on the path of the leaf joined with "/". Layers are stacked on axis 0. Optimizer
# moments carry the parameter's path as a suffix, so the same rules serve them.
RULES: tuple[tuple[str, P], ...] = (
    # The wide axis of the MLP is the one that is cut: gathered piece by piece, each piece of gate and
    # up then is a piece of the result, where pieces of the other axis would each be added to all of
    # it, in float32 (docs/log.md).
    (r"(embed_tokens|lm_head)/weight$", P("tensor", "fsdp")),
    (r"layers/.*(q_proj|k_proj|v_proj)/weight$", P(None, "fsdp", "tensor")),
    (r"layers/.*o_proj/weight$", P(None, "tensor", "fsdp")),
    (r"layers/.*(gate_proj|up_proj)/weight$", P(None, None, ("tensor", "fsdp"))),
    (r"layers/.*down_proj/weight$", P(None, ("tensor", "fsdp"), None)),
    (r"layers/.*(q_proj|k_proj|v_proj|gate_proj|up_proj)/bias$", P(None, "tensor")),
    (r"layers/.*(o_proj|down_proj)/bias$", P()),
    # Adapters are cut like the matrix they stand beside; their rank never is. A of o_proj and
    # down_proj is cut where its input is, so what crosses the devices is [tokens, rank].
    (r"layers/.*(q_proj|k_proj|v_proj)/lora_A$", P(None, "fsdp", None)),
    (r"layers/.*(q_proj|k_proj|v_proj)/lora_B$", P(None, None, "tensor")),
    (r"layers/.*o_proj/lora_A$", P(None, "tensor", None)),
    (r"layers/.*o_proj/lora_B$", P(None, None, "fsdp")),
    (r"layers/.*(gate_proj|up_proj)/lora_A$", P(None, None, None)),
    (r"layers/.*(gate_proj|up_proj)/lora_B$", P(None, None, ("tensor", "fsdp"))),
    (r"layers/.*down_proj/lora_A$", P(None, ("tensor", "fsdp"), None)),
    (r"layers/.*down_proj/lora_B$", P(None, None, None)),
    (r"lm_head/lora_A$", P("fsdp", None)),
    (r"lm_head/lora_B$", P(None, "tensor")),
    (r"norm/weight$", P()),
    (r"layernorm/weight$", P()),
)
ROWS = ("data", "fsdp")


def path_name(path: tuple[Any, ...]) -> str:
    """'model/norm/weight' from a `jax.tree_util` key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def spec(name: str, shape: tuple[int, ...]) -> P:
    """PartitionSpec of one leaf; scalars are replicated, a parameter without a rule is an error."""
    if not shape:
        return P()
    for pattern, found in RULES:
        if re.search(pattern, name):
            return found
    raise ValueError(f"no sharding rule for parameter {name!r} of shape {shape}")


def shardings(mesh: Mesh, tree: Any) -> Any:
    """NamedSharding of every leaf of `tree` (arrays or `ShapeDtypeStruct`s), by `RULES`."""

    def one(path, leaf):
        name = path_name(path)
        partition = spec(name, leaf.shape)
        for axis, size in zip(partition, leaf.shape, strict=False):
            for one in (axis,) if isinstance(axis, str) else axis or ():
                if size % mesh.shape[one]:
                    raise ValueError(
                        f"{name} of shape {leaf.shape}: {size} does not divide by mesh.{one}="
                        f"{mesh.shape[one]}"
                    )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, tree)


def rows(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose axis 0 is the row of a batch."""
    return NamedSharding(mesh, P(ROWS))


def constrain_params(tree: Any) -> Any:
    """Keep a tree like the parameters (gradients) where `RULES` put it, if a mesh is set.

    Nothing else would cut a sum of gradients: XLA keeps a whole one on every device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: lax.with_sharding_constraint(leaf, spec(path_name(path), leaf.shape)),
        tree,
    )


def whole_columns(table_VD: jax.Array) -> jax.Array:
    """The table with whole rows on every device of `fsdp`, which looking rows up in it needs."""
    if jax.sharding.get_abstract_mesh().empty:
        return table_VD
    return lax.with_sharding_constraint(table_VD, P("tensor", None))


def row_axes(rows: int) -> tuple[str, ...] | None:
    """The axes of the mesh that is set which cut `rows` rows; None without one or if uneven."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows % math.prod(mesh.shape[axis] for axis in ROWS):
        return None
    return ROWS


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


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keep activations sharded by row where a mesh is set; without it XLA replicates the batch."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return lax.with_sharding_constraint(x, P(ROWS))
