"""Summed log-probs of packed rows: the one scoring code of training, reference and `score`.

Legend: B rows, T tokens, S scored positions of a row, P item slots of a row, K branches of an item,
G segments of a branch (objectives/preference.py).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saro_jax.data.packing import Rows, Shape, blocks
from saro_jax.data.tokenise import Item
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.models.attention import Kernel, Tokens
from saro_jax.models.lora import Adapters
from saro_jax.objectives.logprobs import TokenScores, token_scores
from saro_jax.objectives.preference import SEGMENTS
from saro_jax.parallel import distributed, sharding


class Sequences(NamedTuple):
    """Sums over the scored tokens of each branch of each item of the rows, float32 [B, P, K, G]."""

    logp: jax.Array
    tokens: jax.Array


def score_tokens(
    arch: Architecture,
    params: Any,
    rows: Rows,
    *,
    dtype: Any,
    remat: str,
    attention: Kernel = "auto",
    entropy: bool = False,
    adapters: Adapters | None = None,
    train_head: bool = True,
    reduce_dtype: Any = jnp.float32,
) -> TokenScores:
    """Log-prob of every scored token of packed rows, [B, S], differentiable in `params`.

    adapters: `lora.bind`, differentiable too. train_head: False = no gradient of the output matrix
    is computed. reduce_dtype: as `decoder.forward` has it.
    """
    where = Tokens(rows.segment, rows.branch, rows.position)
    hidden_BTD = decoder.forward(
        arch,
        params,
        rows.tokens,
        where,
        dtype=dtype,
        remat=remat,
        adapters=adapters,
        attention=attention,
        reduce_dtype=reduce_dtype,
    )
    # On a mesh that cuts tokens, B and S are those of `sharding.deal_tokens` from here on.
    hidden_BSD = sharding.gather_tokens(hidden_BTD, rows.source)
    adapter = None if adapters is None else adapters.of_head()
    scores = token_scores(
        hidden_BSD,
        decoder.head(arch, params),
        sharding.deal_tokens(rows.target),
        sharding.deal_tokens(rows.valid),
        softcap=arch.final_softcap,
        entropy=entropy,
        low_rank=None if adapter is None else (adapter.down(hidden_BSD), adapter.b_rO),
        train_head=train_head,
    )
    return TokenScores(*map(sharding.collect_tokens, scores))


def sum_sequences(logp_BS: jax.Array, rows: Rows, branches: int) -> Sequences:
    """Sums per item, branch and segment; empty slots are 0."""
    P = rows.weight.shape[1]
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=P * branches * SEGMENTS))
    valid = rows.valid.astype(jnp.float32)
    shape = (*rows.weight.shape, branches, SEGMENTS)
    where = rows.sequence * SEGMENTS + rows.part
    return Sequences(
        sums(logp_BS * valid, where).reshape(shape),
        sums(valid, where).reshape(shape),
    )


def put(mesh: Mesh, rows: Rows) -> Rows:
    """The block on the devices of `mesh`, cut by row; of several processes each puts its own."""
    where = sharding.rows(mesh)
    return Rows(*(distributed.place(array, where) for array in rows))


def score_program(
    arch: Architecture,
    *,
    dtype: Any,
    remat: str,
    branches: int,
    attention: Kernel = "auto",
    out: NamedSharding | None = None,
) -> Any:
    """The jitted `(params, rows) -> Sequences`; rows lie on the devices of the mesh that is set.

    out: where the sums lie; None leaves it to the compiler.
    """

    def run(params, rows):
        scores = score_tokens(arch, params, rows, dtype=dtype, remat=remat, attention=attention)
        return sum_sequences(scores.logp, rows, branches)

    return jax.jit(run, out_shardings=out)


def make_scorer(
    arch: Architecture,
    mesh: Mesh,
    *,
    dtype: Any,
    remat: str,
    branches: int,
    attention: Kernel = "auto",
) -> Callable[[Any, Rows], Sequences]:
    """A compiled `(params, rows) -> Sequences`; rows are host arrays.

    Where there are several processes, each computes its rows and gets the sums of all.
    """
    all_sums = NamedSharding(mesh, PartitionSpec()) if distributed.several() else None
    run = score_program(
        arch, dtype=dtype, remat=remat, branches=branches, attention=attention, out=all_sums
    )

    def scorer(params, rows):
        with jax.set_mesh(mesh):
            return run(params, put(mesh, rows))

    return scorer


def score_items(
    scorer: Callable[[Any, Rows], Sequences],
    params: Any,
    items: Sequence[Item],
    groups: Iterable[Sequence[list[int]]],
    shape: Shape,
    own: np.ndarray | None = None,
) -> Iterable[tuple[int, np.ndarray, np.ndarray]]:
    """(index, log-prob sums [K, G], scored tokens [K, G]) of items[i] for every i in the groups.

    Each group is packed by itself: with the groups of the training steps, the rows are the very
    rows that training will see, and in bfloat16 too a reference equals the policy at step 0. own:
    the rows of a block that this process computes; the sums are those of all.
    """
    for group in groups:
        for block in blocks(items, group, shape, own):
            distributed.check_stop()
            sums = jax.device_get(scorer(params, block))
            for b, slot in zip(*np.nonzero(block.item >= 0), strict=True):
                yield int(block.item[b, slot]), sums.logp[b, slot], sums.tokens[b, slot]
