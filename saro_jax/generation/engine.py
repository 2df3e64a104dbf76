"""Generation: prompts to sampled tokens and their log-probs, by a compiled loop over a KV cache.

Legend: B rows of a batch, C tokens of a prefill chunk, S cache slots, D hidden, V vocabulary,
N new tokens.

A batch is prefilled in chunks, so that memory for attention scores stays small however long the
prompts are, and decoded by one `lax.while_loop` until its last row has finished. Prompts are
right-padded. The slots of padding are written, then overwritten by the row's own new tokens before
any query reaches so far: a query at position p attends slots 0..p, and slot p is written with it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm import tqdm

from saro_jax.models import decoder
from saro_jax.models.architecture import Architecture
from saro_jax.models.decoder import Cache, Params

F32 = jnp.float32
CHUNK = 64  # tokens a row of one prefill step; cache sizes are multiples of it


@dataclass(frozen=True, eq=False)
class Completion:
    """What was generated after one prompt.

    ids: int32 [n], the stop token that ended it included. logps: float32 [n], log-probs under the
    model itself, whatever temperature and truncation the tokens were drawn with. finish: "stop" or,
    where max_new_tokens ran out, "length".
    """

    ids: np.ndarray
    logps: np.ndarray
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; top_p 1 and top_k 0 truncate nothing."""

    temperature: float
    top_p: float
    top_k: int


class Weights(NamedTuple):
    """The same parameters for the two phases: layers stacked, and perhaps unstacked."""

    prefill: Params
    decode: Params


class State(NamedTuple):
    """What the decode loop carries: rows of the batch, and the N columns filled so far."""

    step: jax.Array  # tokens that active rows have
    active_B: jax.Array
    length_B: jax.Array  # tokens in the sequence, the newest (not yet in the cache) included
    ids_BN: jax.Array
    logp_BN: jax.Array
    cache: Cache | tuple[Cache, ...]


def generate(
    arch: Architecture,
    params: Params,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop_ids: Iterable[int],
    dtype: Any = F32,
    unroll: bool | None = None,
    progress: bool = False,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue each prompt (int ids, BOS and generation prompt included) until a stop id.

    Matrices are cast to `dtype` once. Token t of prompt i is drawn with the key
    fold_in(fold_in(key(seed), i), t): a sample depends neither on its neighbours nor on batch_size.
    temperature 0 is greedy. top_k and then top_p keep the most probable tokens, after temperature.
    unroll (None: on CPU) decodes layer by layer instead of by a scan: faster there, with a second
    copy of the weights. progress: a bar on stderr. numbers: the i of each prompt, where these are
    some of more; None = 0, 1, ...
    """
    sampling = Sampling(float(temperature), float(top_p), int(top_k))
    _check(arch, prompts, max_new_tokens, batch_size, sampling)
    stops_V = np.isin(np.arange(arch.vocab_size), list(stop_ids))
    params = cast_matrices(params, dtype)
    unroll = jax.default_backend() == "cpu" if unroll is None else unroll
    weights = Weights(params, decoder.unstack_layers(params) if unroll else params)
    key = jax.random.key(seed)
    completions: list[Completion | None] = [None] * len(prompts)
    with tqdm(total=len(prompts), unit="prompt", disable=not progress) as bar:
        for batch in batches([len(prompt) for prompt in prompts], batch_size):
            tokens, lengths, slots = _padded([prompts[i] for i in batch], max_new_tokens)
            state = complete(
                arch,
                weights,
                tokens,
                lengths,
                np.asarray([i if numbers is None else numbers[i] for i in batch], np.int32),
                key,
                stops_V,
                sampling=sampling,
                new=max_new_tokens,
                slots=slots,
                dtype=jnp.dtype(dtype),
            )
            finished, ends, ids, logps = jax.device_get(state)
            for row, i in enumerate(batch):
                n = int(ends[row] - lengths[row])
                finish = "stop" if finished[row] else "length"
                completions[i] = Completion(ids[row, :n].copy(), logps[row, :n].copy(), finish)
            bar.update(len(batch))
    return [completion for completion in completions if completion is not None]


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of the prompts by batch, the longest first, so that memory runs out at once or never.

    The batches are as equal as can be: their rows differ by one at most, which padding evens out.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = -(-len(order) // batch_size)
    rows = -(-len(order) // count) if count else 0
    return [order[start : start + rows] for start in range(0, len(order), rows or 1)]


def cast_matrices(params: Params, dtype: Any) -> Params:
    """The parameters with matrices and biases in `dtype`; norms, which compute in float32, stay."""

    def cast(path, leaf):
        norm = any("norm" in str(step) for step in path)
        return leaf if norm or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def _check(
    arch: Architecture,
    prompts: Sequence[np.ndarray],
    max_new_tokens: int,
    batch_size: int,
    sampling: Sampling,
) -> None:
    for name, value, holds, allowed in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, ">= 1"),
        ("batch_size", batch_size, batch_size >= 1, ">= 1"),
        ("temperature", sampling.temperature, 0 <= sampling.temperature < np.inf, ">= 0"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0, up to 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, ">= 0 (0: all tokens)"),
    ):
        if not holds:
            raise ValueError(f"{name}: {value}; allowed: {allowed}")
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"prompt {i}: {ids.dtype} of shape {ids.shape}; allowed: int ids [n >= 1]"
            )
        if ids.min() < 0 or ids.max() >= arch.vocab_size:
            raise ValueError(
                f"prompt {i}: id {ids.min() if ids.min() < 0 else ids.max()}; allowed: 0 to "
                f"{arch.vocab_size - 1}"
            )
        if ids.size + max_new_tokens > arch.max_position_embeddings:
            raise ValueError(
                f"prompt {i}: {ids.size} tokens and max_new_tokens={max_new_tokens} exceed the "
                f"model's {arch.max_position_embeddings} positions"
            )


def _padded(prompts: Sequence[np.ndarray], new: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Right-padded prompts [B, T], their lengths [B], and the slots that prompt and answer need."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    slots = cache_slots(int(lengths.max()) + new)
    tokens = np.zeros((len(prompts), slots), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths, slots


def cache_slots(tokens: int) -> int:
    """The next size up that a program is compiled for: at most four in an octave."""
    step = max(CHUNK, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


@partial(jax.jit, static_argnames=("arch", "sampling", "new", "slots", "dtype"))
def complete(
    arch, weights, tokens_BS, length_B, request_B, key, stops_V, *, sampling, new, slots, dtype
):
    """The compiled loop of `generate`: (stopped, last length, ids, log-probs) of every row."""
    B = tokens_BS.shape[0]
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(key, request_B)

    def draw(hidden_BD, step):
        with jax.named_scope("logits"):
            logits_BV = decoder.logits(arch, weights.prefill, hidden_BD)
        with jax.named_scope("sample"):
            token_B = _sample(logits_BV, key_B, step, sampling)
            chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], 1)[:, 0]
            return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)

    def write(state: State, token_B, logp_B) -> State:
        ids_BN = state.ids_BN.at[:, state.step].set(jnp.where(state.active_B, token_B, 0))
        logp_BN = state.logp_BN.at[:, state.step].set(jnp.where(state.active_B, logp_B, 0.0))
        length_B = state.length_B + state.active_B
        active_B = state.active_B & ~stops_V[token_B]
        return State(state.step + 1, active_B, length_B, ids_BN, logp_BN, state.cache)

    def more(state: State):
        return (state.step < new) & state.active_B.any()

    def advance(state: State) -> State:
        # A finished row decodes its last token again and again, into the same slot.
        token_B = state.ids_BN[jnp.arange(B), state.length_B - length_B - 1]
        position_B = state.length_B - 1
        hidden_BTD, cache = decoder.decode(
            arch, weights.decode, token_B[:, None], position_B[:, None], state.cache, dtype=dtype
        )
        return write(state._replace(cache=cache), *draw(hidden_BTD[:, 0], state.step))

    hidden_BD, cache = _prefill(arch, weights.prefill, tokens_BS, length_B, dtype)
    if isinstance(weights.decode["model"]["layers"], tuple):
        cache = decoder.unstack(cache, arch.num_layers)
    state = State(
        jnp.int32(0),
        jnp.ones(B, bool),
        length_B,
        jnp.zeros((B, new), jnp.int32),
        jnp.zeros((B, new), F32),
        cache,
    )
    state = write(state, *draw(hidden_BD, state.step))
    state = lax.while_loop(more, advance, state)
    return ~state.active_B, state.length_B, state.ids_BN, state.logp_BN


def _prefill(arch, params, tokens_BS, length_B, dtype) -> tuple[jax.Array, Cache]:
    """Hidden state of each row's last prompt token [B, D], and the cache that holds the prompts."""
    B, slots = tokens_BS.shape

    def chunk(i, carry):
        last_BD, cache = carry
        tokens_BC = lax.dynamic_slice_in_dim(tokens_BS, i * CHUNK, CHUNK, axis=1)
        position_BC = jnp.broadcast_to(i * CHUNK + jnp.arange(CHUNK), (B, CHUNK))
        hidden_BCD, cache = decoder.decode(arch, params, tokens_BC, position_BC, cache, dtype=dtype)
        within_B = length_B - 1 - i * CHUNK
        here_BCD = jnp.take_along_axis(
            hidden_BCD, jnp.clip(within_B, 0, CHUNK - 1)[:, None, None], axis=1
        )
        mine_B = (within_B >= 0) & (within_B < CHUNK)
        return jnp.where(mine_B[:, None], here_BCD[:, 0], last_BD), cache

    with jax.named_scope("prefill"):
        start = (
            jnp.zeros((B, arch.hidden_size), dtype),
            decoder.empty_cache(arch, B, slots, dtype),
        )
        return lax.fori_loop(0, -(-length_B.max() // CHUNK), chunk, start)


def _sample(logits_BV, key_B, step, sampling: Sampling) -> jax.Array:
    """Token of each row, int32 [B]; the key of a row depends on its request and step alone."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = truncate(logits_BV / sampling.temperature, sampling.top_p, sampling.top_k)
    key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    return jax.vmap(jax.random.categorical)(key_B, logits_BV).astype(jnp.int32)


def truncate(logits_BV: jax.Array, top_p: float, top_k: int) -> jax.Array:
    """-inf in place of all but the top_k and, of those, the fewest that hold top_p probability.

    Tokens that tie with the last one kept are kept. The most probable token always is.
    """
    if 0 < top_k < logits_BV.shape[-1]:
        kth_B1 = lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if top_p < 1.0:
        p_BV = jax.nn.softmax(logits_BV, axis=-1)
        logits_BV = jnp.where(p_BV >= _nucleus_floor(p_BV, top_p), logits_BV, -jnp.inf)
    return logits_BV


def _nucleus_floor(p_BV: jax.Array, top_p: float) -> jax.Array:
    """Largest probability whose holders and betters sum to top_p, [B, 1].

    Bisected on the bits of the float, which order as the numbers do (they are not negative): 31
    sums over the vocabulary, where sorting it would take most of a decode step.
    """

    def bisect(_, bounds):
        low, high = bounds  # the mass above `low` suffices, the mass above `high` does not
        middle = low + (high - low) // 2
        kept = p_BV >= lax.bitcast_convert_type(middle, F32)
        enough = jnp.sum(p_BV * kept, axis=-1, keepdims=True) >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = lax.bitcast_convert_type(p_BV.max(axis=-1, keepdims=True), jnp.int32)
    low, _ = lax.fori_loop(0, 31, bisect, (jnp.zeros_like(top), top + 1))
    return lax.bitcast_convert_type(low, F32)
