"""One optimizer step: gradients of packed blocks summed up, then one update. Pure functions.

Legend: B rows, S scored positions of a row, P item slots of a row, K branches of an item.

A step is `accumulate` over its blocks and one `update`. Losses are sums; `total`, the weight of the
whole step, is known before the first block, so any cut into blocks gives the same step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from saro_jax.config import Config
from saro_jax.data.packing import Rows
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.objectives import preference
from saro_jax.objectives.sft import nll
from saro_jax.parallel import sharding
from saro_jax.training.scoring import score_tokens, sum_sequences

Sums = dict[str, jax.Array]


class State(NamedTuple):
    """What training carries from step to step."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: Any  # master weights
    optimizer: Any  # optax state


def rw_loss(arch: Architecture, config: Config, params, rows: Rows, reference, total):
    """Warmup: weighted NLL of the scored tokens over `total`, and sums for the metrics."""
    scores = _score(arch, config, params, rows, entropy=True)
    weight_BS = jnp.take_along_axis(rows.weight, rows.sequence, axis=1)
    loss = nll(scores.logp, rows.valid, weight_BS) / total
    sums = {
        "loss": loss,
        "scored": rows.valid.sum(dtype=jnp.float32),
        "correct": scores.correct.sum(),
        "entropy": scores.entropy.sum(),
    }
    return loss, sums


def srpo_loss(arch: Architecture, config: Config, params, rows: Rows, reference, total):
    """SRPO: weighted preference loss of the pairs over `total`; reference: float32 [B, P, 2]."""
    scores = _score(arch, config, params, rows, entropy=False)
    sequences = sum_sequences(scores.logp, rows, branches=2)
    pairs = preference.Pairs(
        *(sequences.logp[..., k] for k in (0, 1)),
        *(reference[..., k] for k in (0, 1)),
        *(sequences.tokens[..., k] for k in (0, 1)),
    )
    present = rows.item >= 0
    losses = jnp.where(present, preference.losses(pairs, config.srpo), 0.0)
    loss = jnp.sum(losses * rows.weight) / total
    sums = {
        name: jnp.sum(jnp.where(present, value, 0.0))
        for name, value in preference.metrics(pairs, config.srpo.beta).items()
    }
    sums |= {
        "loss": loss,
        "pairs": present.sum(dtype=jnp.float32),
        "scored": rows.valid.sum(dtype=jnp.float32),
        "correct": scores.correct.sum(),
    }
    return loss, sums


LOSSES = {"rw": rw_loss, "srpo": srpo_loss}


def _score(arch, config: Config, params, rows, *, entropy: bool):
    return score_tokens(
        arch,
        params,
        rows,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        entropy=entropy,
    )


class Programs(NamedTuple):
    """The compiled pieces of a step."""

    accumulate: Callable[..., tuple[Any, Sums]]  # (params, gradients, rows, reference, total)
    update: Callable[[State, Any], tuple[State, Sums]]
    evaluate: Callable[..., Sums]  # (params, rows, reference, total)
    zeros: Callable[[Any], Any]  # params -> gradients of zeros


def abstract_params(arch: Architecture, dtype: Any) -> Any:
    """Shapes of the trained parameters."""
    return decoder.abstract_params(arch, dtype)


def init_state(optimizer: optax.GradientTransformation, params: Any, mesh: Mesh) -> State:
    """State at step 0, the optimizer's moments laid out as the parameters they belong to."""
    shapes = jax.eval_shape(optimizer.init, params)
    inner = jax.jit(optimizer.init, out_shardings=sharding.shardings(mesh, shapes))(params)
    # Committed to the mesh like the rest, so that step 1 and step 2 are one program.
    start = jax.device_put(np.zeros((), np.int32), NamedSharding(mesh, PartitionSpec()))
    return State(start, params, inner)


def owned(state: State) -> State:
    """The same arrays in buffers of XLA's own: restored ones on CPU can not be donated."""
    return jax.jit(lambda s: jax.tree.map(lambda x: x + 0, s))(state)


def programs(
    arch: Architecture, config: Config, stage: str, optimizer: optax.GradientTransformation
) -> Programs:
    """Jit the pieces for one stage; gradients and state are donated, updated in place."""

    def loss(params, rows, reference, total):
        return LOSSES[stage](arch, config, params, rows, reference, total)

    def accumulate(params, gradients, rows, reference, total):
        (_, sums), new = jax.value_and_grad(loss, has_aux=True)(params, rows, reference, total)
        summed = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradients, new)
        return sharding.constrain_params(summed), sums

    def update(state: State, gradients):
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        return State(state.step + 1, params, inner), {"grad_norm": norm}

    def zeros(params):
        return sharding.constrain_params(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        )

    return Programs(
        jax.jit(accumulate, donate_argnums=1),
        jax.jit(update, donate_argnums=0),
        jax.jit(lambda *args: loss(*args)[1]),
        jax.jit(zeros),
    )
