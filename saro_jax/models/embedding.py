"""Rows of the embedding table, which lies cut over the devices: they are sent, not the table.

Legend: B rows, T tokens, D hidden, V vocabulary; on a mesh each device has some of B and T and, of
the table, some of V (tensor) and some of D (`sharding.SHARDS`).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from saro_jax.parallel.sharding import SHARDS, axis_parts, row_axes, whole_columns


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
    """table[tokens] as `dtype`, [B, T, D], cut by row and token where a mesh is set.

    Each device looks its columns up for the tokens of all devices that share the table out, and
    sends each what is its own: megabytes of activations, where gathering the table and reducing its
    gradient would be gigabytes. Where sizes do not divide, the table is gathered.
    """
    rows, tensor = row_axes(tokens_BT.shape[0]), axis_parts("tensor")
    even = table_VD.shape[1] % axis_parts(SHARDS) == 0 and table_VD.shape[0] % tensor == 0
    even &= tokens_BT.shape[1] % axis_parts("sequence") == 0
    if rows is None or not even or axis_parts(SHARDS) * tensor == 1:
        return whole_columns(table_VD)[tokens_BT].astype(dtype)
    run = jax.shard_map(
        partial(_local, tensor=tensor, dtype=dtype),
        in_specs=(P("tensor" if tensor > 1 else None, SHARDS), P(rows, "sequence")),
        out_specs=P(rows, "sequence"),
    )
    return run(table_VD, tokens_BT)


def _local(table_VD: jax.Array, tokens_BT: jax.Array, *, tensor: int, dtype: Any) -> jax.Array:
    ids = lax.all_gather(tokens_BT, SHARDS, tiled=True)
    if tensor == 1:
        x = table_VD[ids].astype(dtype)
    else:
        ids = ids - lax.axis_index("tensor") * table_VD.shape[0]
        mine = (ids >= 0) & (ids < table_VD.shape[0])
        x = jnp.where(mine[..., None], table_VD[jnp.where(mine, ids, 0)], 0).astype(dtype)
    x = lax.all_to_all(x, SHARDS, split_axis=0, concat_axis=2, tiled=True)
    # One term of the sum is not zero: exact in any dtype.
    return x if tensor == 1 else lax.psum(x, "tensor")
