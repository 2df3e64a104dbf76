"""The compiled programs of generation: prefill, place, resize, and the decode loop.

Legend: B slots, P prompts of one prefill, A placed samples, T tokens of a prompt, S cache slots of
a row, K key/value heads, H head width, L layers, D hidden, V vocabulary, W steps of a burst, F
forced tokens.

Shapes are few: T and S are of `sizes`, all else is constant. The cache is an argument and a result,
donated. A query at position p attends the cache slots 0..p, which the row has written by then, so
what an earlier occupant left beyond is never seen.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from saro_jax.generation.sampling import Settings, draw
from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Cache, Params
from saro_jax.parallel.sharding import ROWS, axis_parts, constrain

F32 = jnp.float32
CHUNK = 64  # cache sizes are multiples of it
LONGEST = 512  # tokens of a prompt that are prefilled at a time
BURST = 32  # decode steps after which the host looks, at the latest
FORCED = 16  # tokens that can be forced upon a row at a time
NONE = -1

Layers = Cache | tuple[Cache, ...]


class Slots(NamedTuple):
    """What the decode loop knows of each slot; between bursts it lies on the host.

    token: the newest, not yet in the cache. position: its place in the sequence. made: tokens
    generated so far. limit: how many may be. key: words of the sample's random key. forced: tokens
    that are put in place of those drawn from the `forced_at`-th on, NONE where none is.
    """

    active_B: Any
    token_B: Any
    position_B: Any
    made_B: Any
    limit_B: Any
    key_B2: Any
    settings: Settings
    forced_BF: Any
    forced_at_B: Any


class Burst(NamedTuple):
    """What a burst made: of each slot `count` tokens, and whether the last of them is a stop."""

    slots: Slots
    ids_BW: Any
    logps_BW: Any
    count_B: Any
    stopped_B: Any


def sizes(tokens: int) -> int:
    """The next size up that a program is compiled for: at most four in an octave."""
    step = max(CHUNK, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


def cast_matrices(params: Params, dtype: Any) -> Params:
    """The parameters with matrices and biases in `dtype`; norms, which compute in float32, stay."""

    def cast(path, leaf):
        norm = any("norm" in str(step) for step in path)
        return leaf if norm or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _laid_out(cache: Layers) -> Layers:
    """The cache cut by slot and by head, where a mesh is set."""

    return jax.tree.map(lambda x: constrain(x, partition(x.shape[-3], x.shape[-4], x.ndim)), cache)


def partition(heads: int, rows: int, axes: int) -> P:
    """How the mesh that is set cuts keys or values of so many heads, rows and axes."""
    by_head = "tensor" if heads % axis_parts("tensor") == 0 else None
    by_row = ROWS if rows % axis_parts(ROWS) == 0 else None
    return P(*(None,) * (axes - 4), by_row, by_head)


def prefill_parts(tokens: int) -> int:
    """In how many equal parts a prompt of that size is prefilled, of LONGEST tokens at most."""
    return next(n for n in range(-(-tokens // LONGEST), tokens + 1) if tokens % n == 0)


@partial(jax.jit, static_argnames=("arch", "slots", "size", "dtype", "unroll"))
def empty(arch: Architecture, *, slots: int, size: int, dtype: Any, unroll: bool) -> Layers:
    """A cache of `slots` rows of `size` tokens, layers apart where they are to be unrolled."""
    cache = decoder.empty_cache(arch, slots, size, dtype)
    return _laid_out(decoder.unstack(cache, arch.num_layers) if unroll else cache)


@partial(jax.jit, static_argnames=("arch", "dtype", "held"))
def prefill(
    arch: Architecture, params: Params, tokens_PT: jax.Array, *, dtype: Any, held: Any
) -> Layers:
    """Keys and values of right-padded prompts, in `held`, [L, P, K, T, H] or apart by layer."""
    P_, T = tokens_PT.shape
    parts = prefill_parts(T)
    C = T // parts

    def part(i, cache):
        tokens_PC = lax.dynamic_slice_in_dim(tokens_PT, i * C, C, axis=1)
        position_PC = jnp.broadcast_to(i * C + jnp.arange(C, dtype=jnp.int32), (P_, C))
        return decoder.decode(arch, params, tokens_PC, position_PC, cache, dtype=dtype)[1]

    with jax.named_scope("prefill"):
        start = decoder.empty_cache(arch, P_, T, held)
        if isinstance(params["model"]["layers"], tuple):
            start = decoder.unstack(start, arch.num_layers)
        return lax.fori_loop(0, parts, part, _laid_out(start))


@partial(jax.jit, donate_argnums=0)
def place(cache: Layers, prompts: Layers, slot_A: jax.Array, source_A: jax.Array) -> Layers:
    """Copy the prompts' rows source_A into slot_A of the cache; a slot past the last is dropped."""

    def copied(old, rows):
        layers = (slice(None),) * (old.ndim - 4)
        new = jnp.take(rows, source_A, axis=rows.ndim - 4)
        at = (*layers, slot_A, slice(None), slice(rows.shape[-2]))
        return old.at[at].set(new, mode="drop")

    return _laid_out(jax.tree.map(copied, cache, prompts))


@partial(jax.jit, static_argnames="size")
def resize(cache: Layers, *, size: int) -> Layers:
    """The cache with rows of `size` tokens: more, or fewer where the rest is not needed."""

    def resized(x):
        more = max(0, size - x.shape[-2])
        return jnp.pad(x, (*((0, 0),) * (x.ndim - 2), (0, more), (0, 0)))[..., :size, :]

    return _laid_out(jax.tree.map(resized, cache))


@partial(jax.jit, static_argnames=("arch", "dtype"), donate_argnums=2)
def burst(
    arch: Architecture,
    params: Params,
    cache: Layers,
    slots: Slots,
    stops_V: jax.Array,
    enough: jax.Array,
    *,
    dtype: Any,
) -> tuple[Layers, Burst]:
    """Decode up to BURST tokens of every active slot, until `enough` slots have come to their end.

    A slot ends at a stop token or at its limit. One that is not active decodes its last token again
    and again, into the same place.
    """
    B = slots.token_B.shape[0]
    before = slots.active_B.sum()

    def more(carry):
        step, _, burst = carry
        active = burst.slots.active_B.sum()
        return (step < BURST) & (active > 0) & (before - active < enough)

    def advance(carry):
        step, cache, (slots, ids_BW, logps_BW, count_B, stopped_B) = carry
        hidden_BTD, cache = decoder.decode(
            arch,
            params,
            slots.token_B[:, None],
            slots.position_B[:, None],
            cache,
            dtype=dtype,
        )
        with jax.named_scope("logits"):
            logits_BV = decoder.logits(arch, params, hidden_BTD[:, 0])
        with jax.named_scope("sample"):
            key_B = jax.random.wrap_key_data(slots.key_B2, impl="threefry2x32")
            key_B = jax.vmap(jax.random.fold_in)(key_B, slots.made_B)
            drawn_B = draw(logits_BV, key_B, slots.settings)
            at_B = slots.made_B - slots.forced_at_B
            forced_B = jnp.take_along_axis(
                slots.forced_BF, jnp.clip(at_B, 0, FORCED - 1)[:, None], axis=1
            )[:, 0]
            is_forced_B = (at_B >= 0) & (at_B < FORCED) & (forced_B != NONE)
            token_B = jnp.where(is_forced_B, forced_B, drawn_B)
            chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
            logp_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        active_B = slots.active_B
        made_B = slots.made_B + active_B
        stop_B = active_B & stops_V[token_B] & ~is_forced_B
        slots = slots._replace(
            active_B=active_B & ~stop_B & (made_B < slots.limit_B),
            token_B=jnp.where(active_B, token_B, slots.token_B),
            position_B=slots.position_B + active_B,
            made_B=made_B,
        )
        made = Burst(
            slots,
            ids_BW.at[:, step].set(token_B),
            logps_BW.at[:, step].set(logp_B),
            count_B + active_B,
            stopped_B | stop_B,
        )
        return step + 1, cache, made

    start = Burst(
        slots,
        jnp.zeros((B, BURST), jnp.int32),
        jnp.zeros((B, BURST), F32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(B, bool),
    )
    _, cache, made = lax.while_loop(more, advance, (jnp.int32(0), cache, start))
    return _laid_out(cache), made


def idle(slots: int) -> Slots:
    """Slots without occupants, as arrays of the host."""
    return Slots(
        active_B=np.zeros(slots, bool),
        token_B=np.zeros(slots, np.int32),
        position_B=np.zeros(slots, np.int32),
        made_B=np.zeros(slots, np.int32),
        limit_B=np.zeros(slots, np.int32),
        key_B2=np.zeros((slots, 2), np.uint32),
        settings=Settings(
            np.zeros(slots, np.float32),
            np.ones(slots, np.float32),
            np.zeros(slots, np.int32),
            np.zeros(slots, np.float32),
        ),
        forced_BF=np.full((slots, FORCED), NONE, np.int32),
        forced_at_B=np.zeros(slots, np.int32),
    )
