"""One optimizer step: gradients of packed blocks summed up, then one update. Pure functions.

Legend: B rows, S scored positions of a row, P item slots of a row, K branches of an item,
G segments of a branch (objectives/preference.py).

A step is `accumulate` over its blocks and one `update`, or `whole` where it has one block: then the
gradients exist from the backward pass on, not through the forward one. Losses are sums; `total`,
the weight of the whole step, is known before the first block, so any cut into blocks gives the
same step.
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
from saro_jax.objectives.kto import kto
from saro_jax.objectives.sft import nll
from saro_jax.parallel import distributed, sharding
from saro_jax.training import trainable
from saro_jax.training.scoring import score_tokens, sum_sequences

Sums = dict[str, jax.Array]


class State(NamedTuple):
    """What training carries from step to step."""

    step: jax.Array  # int32 scalar, optimizer steps done
    params: Any  # master weights of what trains (`trainable.split`)
    optimizer: Any  # optax state
    reference: Any = ()  # parameters of a resident reference policy, a tree like params


class Given(NamedTuple):
    """What a preference loss is given beside a block's rows and the policy."""

    reference: jax.Array  # float32 [B, P, K, G], log-prob sums under the reference policy
    kind: jax.Array  # int32 [B, P], number of each pair's kind
    baseline: jax.Array  # float32 scalar, kto's z0


def rw_loss(arch: Architecture, config: Config, kinds: int, params, rows, given, total, key=None):
    """Warmup: weighted NLL of the scored tokens over `total`, and sums for the metrics."""
    scores = _score(arch, config, params, rows, key, entropy=True)
    weight_BS = jnp.take_along_axis(rows.weight, rows.sequence, axis=1)
    loss = nll(scores.logp, rows.valid, weight_BS) / total
    sums = {
        "loss": loss,
        "scored": rows.valid.sum(dtype=jnp.float32),
        "correct": scores.correct.sum(),
        "entropy": scores.entropy.sum(),
    }
    return loss, sums


def srpo_loss(
    arch: Architecture,
    config: Config,
    kinds: int,
    params,
    rows: Rows,
    given: Given,
    total,
    key=None,
):
    """SRPO: weighted preference loss of the pairs over `total`, and sums for the metrics."""
    scores = _score(arch, config, params, rows, key, entropy=False)
    sequences = sum_sequences(scores.logp, rows, branches=2)
    pairs = preference.Pairs(
        *(sequences.logp[..., k, :] for k in (0, 1)),
        *(given.reference[..., k, :] for k in (0, 1)),
        *(sequences.tokens[..., k, :] for k in (0, 1)),
        noise=jnp.where(rows.noise >= 0, rows.noise, config.srpo.label_smoothing),
    )
    present = rows.item >= 0
    losses = jnp.where(present, preference.losses(pairs, config.srpo), 0.0)
    loss = jnp.sum(losses * rows.weight) / total
    sums = {
        name: _sum_kinds(value, present, given.kind, kinds)
        for name, value in preference.metrics(pairs, config.srpo).items()
    }
    return loss, sums | _token_sums(loss, scores, rows)


def kto_loss(
    arch: Architecture,
    config: Config,
    kinds: int,
    params,
    rows: Rows,
    given: Given,
    total,
    key=None,
):
    """SRPO on unpaired rows: weighted KTO loss of the responses over `total`, and sums."""
    scores = _score(arch, config, params, rows, key, entropy=False)
    logp = sum_sequences(scores.logp, rows, branches=1).logp.sum(-1)[..., 0]
    ratio = logp - given.reference.sum(-1)[..., 0]
    present = rows.item >= 0
    losses = jnp.where(present, kto(ratio, rows.label, given.baseline, config.srpo), 0.0)
    loss = jnp.sum(losses * rows.weight) / total
    sums = {}
    for name, chosen in (("chosen", present & (rows.label > 0)), ("rejected", rows.label == 0)):
        counts = present & chosen
        sums[f"rewards/{name}"] = _sum_kinds(config.srpo.beta * ratio, counts, given.kind, kinds)
        sums[f"logps/{name}"] = _sum_kinds(logp, counts, given.kind, kinds)
    return loss, sums | _token_sums(loss, scores, rows)


LOSSES = {"rw": rw_loss, "srpo": srpo_loss, "kto": kto_loss}


def _sum_kinds(value_BP, counts_BP, kind_BP, kinds: int) -> jax.Array:
    """(sum, number) of the values that count, of all pairs, then by kind: [1 + kinds, 2]."""
    parts = jnp.stack([jnp.where(counts_BP, value_BP, 0.0), counts_BP.astype(jnp.float32)], -1)
    whole = parts.sum((0, 1))[None]
    if not kinds:
        return whole
    by_kind = jax.ops.segment_sum(parts.reshape(-1, 2), kind_BP.ravel(), num_segments=kinds)
    return jnp.concatenate([whole, by_kind])


def _token_sums(loss, scores, rows: Rows) -> Sums:
    scored = rows.valid.sum(dtype=jnp.float32)
    return {"loss": loss, "scored": scored, "correct": scores.correct.sum()}


def _score(arch, config: Config, params, rows, key=None, *, entropy: bool):
    """Scores under the whole tree, adapters included; `key` draws their dropout, None = none."""
    base, adapters = trainable.apart(config, params, key)
    return score_tokens(
        arch,
        base,
        rows,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=config.model.attention,
        entropy=entropy,
        adapters=adapters,
        train_head=trainable.trains_head(arch, config),
        reduce_dtype=jnp.dtype(config.train.reduce_dtype),
    )


def _dropout_key(config: Config, draw: jax.Array) -> jax.Array | None:
    """The key of one block of one step; None without dropout."""
    if not config.lora.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(config.seed), draw[0])
    return jax.random.fold_in(key, draw[1])


class Programs(NamedTuple):
    """The compiled pieces of a step.

    `params` is the trained tree; `frozen` what is only read ({} where all trains). `draw`, int32
    [2]: step and block, which with the seed decide the dropout of adapters.
    """

    # (params, gradients, rows, given, total, frozen, draw)
    accumulate: Callable[..., tuple[Any, Sums]]
    update: Callable[[State, Any], tuple[State, Sums]]
    # A step of one block, in one program: (state, rows, given, total, frozen, draw)
    whole: Callable[..., tuple[State, Sums, Sums]]
    evaluate: Callable[..., Sums]  # (params, rows, given, total, frozen)
    zeros: Callable[[Any], Any]  # params -> gradients of zeros
    score: Callable[..., jax.Array]  # (params, frozen, rows) -> log-prob sums [B, P, K, G]
    sync: Callable[[State], State]  # moves a resident reference towards the policy


def abstract_params(arch: Architecture, dtype: Any) -> Any:
    """Shapes of the trained parameters."""
    return decoder.abstract_params(arch, dtype)


def init_state(
    optimizer: optax.GradientTransformation,
    params: Any,
    mesh: Mesh,
    *,
    resident: bool = False,
    offload: bool = False,
) -> State:
    """State at step 0, the optimizer's moments laid out as the parameters they belong to.

    resident: with a copy of the parameters as the reference policy. offload: the moments in the
    host's memory, for an optimizer that expects them there.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    places = sharding.shardings(mesh, shapes)
    places = sharding.on_host(places, shapes) if offload else places
    inner = jax.jit(optimizer.init, out_shardings=places)(params)
    # Committed to the mesh like the rest, so that step 1 and step 2 are one program.
    start = distributed.place(np.zeros((), np.int32), NamedSharding(mesh, PartitionSpec()))
    # A copy: the parameters' own buffers are donated to the first update.
    reference = jax.tree.map(lambda leaf: leaf + 0, params) if resident else ()
    return State(start, params, inner, reference)


def owned(state: State) -> State:
    """The same arrays in buffers of XLA's own: restored ones on CPU can not be donated."""
    leaves, tree = jax.tree.flatten(state)
    # What lies in the host's memory (optimizer.offload) stays: nothing is computed there.
    here = {i: x for i, x in enumerate(leaves) if x.sharding.memory_kind != sharding.HOST}
    copies = jax.jit(lambda xs: jax.tree.map(lambda x: x + 0, xs))(here)
    return tree.unflatten([copies.get(i, x) for i, x in enumerate(leaves)])


def programs(
    arch: Architecture,
    config: Config,
    stage: str,
    optimizer: optax.GradientTransformation,
    kinds: int = 0,
) -> Programs:
    """Jit the pieces for one stage; gradients and state are donated, updated in place.

    kinds: number of kinds of pairs that have metrics of their own.
    """
    unpaired = stage == "srpo" and config.srpo.loss == "kto"
    stage_loss = LOSSES["kto" if unpaired else stage]

    def loss(params, frozen, rows, given, total, key=None):
        whole = trainable.join(params, frozen)
        return stage_loss(arch, config, kinds, whole, rows, given, total, key)

    def accumulate(params, gradients, rows, given, total, frozen=None, draw=None):
        key = None if draw is None else _dropout_key(config, draw)

        def of(params):
            return loss(params, frozen or {}, rows, given, total, key)

        value, pullback, sums = jax.vjp(of, params, has_aux=True)
        # The backward pass adds to the sums where they lie: no second tree of gradients. It needs
        # sums of the parameters' dtype.
        same = jax.tree.map(lambda x, g: x.dtype == g.dtype, params, gradients)
        if all(jax.tree.leaves(same)):
            refs = jax.tree.map(jax.new_ref, gradients)
            pullback.with_refs(refs)(jnp.ones_like(value))
            summed = jax.tree.map(jax.freeze, refs)
        else:
            (new,) = pullback(jnp.ones_like(value))
            summed = jax.tree.map(lambda a, b: a + b.astype(a.dtype), gradients, new)
        return sharding.constrain_params(summed), sums

    def evaluate(params, rows, given, total, frozen=None):
        return loss(params, frozen or {}, rows, given, total)[1]

    def update(state: State, gradients):
        updates, inner = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(gradients)
        return State(state.step + 1, params, inner, state.reference), {"grad_norm": norm}

    def whole(state: State, rows, given, total, frozen=None, draw=None):
        key = None if draw is None else _dropout_key(config, draw)

        def of(params):
            return loss(params, frozen or {}, rows, given, total, key)

        new, sums = jax.grad(of, has_aux=True)(state.params)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32), new)
        state, norm = update(state, sharding.constrain_params(gradients))
        return state, norm, sums

    def zeros(params):
        return sharding.constrain_params(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        )

    def score(params, frozen, rows):
        scores = _score(arch, config, trainable.join(params, frozen or {}), rows, entropy=False)
        return sum_sequences(scores.logp, rows, branches=1 if unpaired else 2).logp

    def sync(state: State):
        # TR-DPO, Gorbatovski et al. 2024 (arXiv 2404.09656): soft, and hard where alpha is 1.
        alpha = config.srpo.sync_mix
        mixed = jax.tree.map(
            lambda new, old: (alpha * new + (1 - alpha) * old).astype(old.dtype),
            state.params,
            state.reference,
        )
        return state._replace(reference=mixed)

    return Programs(
        jax.jit(accumulate, donate_argnums=1),
        jax.jit(update, donate_argnums=0),
        jax.jit(whole, donate_argnums=0),
        jax.jit(evaluate),
        jax.jit(zeros),
        jax.jit(score),
        jax.jit(sync, donate_argnums=0),
    )
