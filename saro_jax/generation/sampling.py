"""How a token is drawn from logits: temperature, truncation, and one draw for each row.

Legend: B rows, V vocabulary, G groups of the vocabulary, W tokens of a group.

All settings are arrays, one value a row: no request compiles a program of its own. Thresholds are
bisected on the bits of floats, for sorting the vocabulary would take most of a decode step, and
what no row asks for is not computed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

F32 = jnp.float32
GROUP = 256  # tokens that a draw looks through, once their group is drawn


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: temperature 0 is greedy; top_p 1, top_k 0, min_p 0 truncate nothing."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, holds, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, ">= 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1"),
            ("top_k", self.top_k, self.top_k >= 0, ">= 0 (0: all tokens)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "0 to 1"),
        ):
            if not holds:
                raise ValueError(f"{name}: {value}; allowed: {allowed}")


class Settings(NamedTuple):
    """`Sampling` of every row, [B] each."""

    temperature: Any
    top_p: Any
    top_k: Any
    min_p: Any


def key_words(seed: int) -> np.ndarray:
    """The two words of `jax.random.key(seed)`, uint32 [2]; of a seed of 64 bits, all count."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def draw(logits_BV: jax.Array, key_B: jax.Array, settings: Settings) -> jax.Array:
    """The token of each row, int32 [B]; that of a row depends on its logits, key and settings."""
    best_B = _first_best(logits_BV)
    warm_B = settings.temperature > 0

    def drawn() -> jax.Array:
        temperature_B = jnp.where(warm_B, settings.temperature, 1.0)
        kept_BV = truncate(
            logits_BV / temperature_B[:, None], settings.top_p, settings.top_k, settings.min_p
        )
        return jnp.where(warm_B, categorical(kept_BV, key_B, best_B), best_B)

    return lax.cond(warm_B.any(), drawn, lambda: best_B)


def _first_best(logits_BV: jax.Array) -> jax.Array:
    """argmax, int32 [B], as two plain reductions: a tenth of its time on a CPU."""
    V = logits_BV.shape[-1]
    token_BV = lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    best_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best_BV, token_BV, V - 1), axis=-1)


def categorical(logits_BV: jax.Array, key_B: jax.Array, best_B: jax.Array) -> jax.Array:
    """A token of each row by the softmax of its logits, int32 [B]; best_B: the most probable.

    Inverts the distribution function: of groups of tokens, then within the group. Two random
    numbers a row take the place of one a token (Gumbel noise), which costs as much as a layer.
    """
    B, V = logits_BV.shape
    p_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    p_BGW = jnp.pad(p_BV, ((0, 0), (0, -V % GROUP))).reshape(B, -1, GROUP)
    u_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,), F32))(key_B)
    group_B, found_B = _inverted(p_BGW.sum(axis=-1), u_B2[:, 0])
    p_BW = jnp.take_along_axis(p_BGW, group_B[:, None, None], axis=1)[:, 0]
    token_B, also_B = _inverted(p_BW, u_B2[:, 1])
    return jnp.where(found_B & also_B, group_B * GROUP + token_B, best_B).astype(jnp.int32)


def _inverted(p_BN: jax.Array, u_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first entry up to which the sums exceed u times the total, and whether there is one.

    Sums in another order can differ in their last bit, so an entry without mass is never taken.
    """
    sum_BN = jnp.cumsum(p_BN, axis=-1)
    beyond_BN = (sum_BN > (u_B * sum_BN[:, -1])[:, None]) & (p_BN > 0)
    return jnp.argmax(beyond_BN, axis=-1).astype(jnp.int32), beyond_BN.any(axis=-1)


def truncate(
    logits_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
    """-inf in place of all but the top_k; of those the fewest that hold top_p; of those, min_p.

    min_p is a share of the largest probability. Tokens that tie with the last one kept are kept.
    The most probable token always is.
    """
    V = logits_BV.shape[-1]
    few_B, nucleus_B, floor_B = (top_k_B > 0) & (top_k_B < V), top_p_B < 1.0, min_p_B > 0.0

    def largest(x_BV):
        kth_B1 = _kth(x_BV, jnp.where(few_B, top_k_B, V))
        return jnp.where(x_BV >= kth_B1, x_BV, -jnp.inf)

    def probable(x_BV):
        p_BV = jax.nn.softmax(x_BV, axis=-1)
        keep_BV = p_BV >= _nucleus_floor(p_BV, top_p_B[:, None])
        return jnp.where(keep_BV | ~nucleus_B[:, None], x_BV, -jnp.inf)

    def near(x_BV):
        bound_B = jnp.max(x_BV, axis=-1) + jnp.log(jnp.maximum(min_p_B, 1e-38))
        keep_BV = (x_BV >= bound_B[:, None]) | ~floor_B[:, None]
        return jnp.where(keep_BV, x_BV, -jnp.inf)

    for asked_B, cut in ((few_B, largest), (nucleus_B, probable), (floor_B, near)):
        logits_BV = lax.cond(asked_B.any(), cut, lambda x_BV: x_BV, logits_BV)
    return logits_BV


def _bisected(
    enough: Callable[[jax.Array], jax.Array], low_B1: jax.Array, high_B1: jax.Array
) -> jax.Array:
    """The largest int32 for which `enough` holds, where it does for low and not for high."""

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # of two int32, without overflow
        holds = enough(middle)
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    return lax.fori_loop(0, 32, halve, (low_B1, high_B1))[0]


def _kth(x_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """The k-th largest entry of each row, [B, 1]."""

    def turned(bits):  # int32 in the order of the floats; its own inverse
        return bits ^ ((bits >> 31) & 0x7FFFFFFF)

    order_BV = turned(lax.bitcast_convert_type(x_BV, jnp.int32))
    found_B1 = _bisected(
        lambda at_B1: jnp.sum(order_BV >= at_B1, axis=-1, keepdims=True) >= k_B[:, None],
        order_BV.min(axis=-1, keepdims=True),
        order_BV.max(axis=-1, keepdims=True) + 1,
    )
    return lax.bitcast_convert_type(turned(found_B1), F32)


def _nucleus_floor(p_BV: jax.Array, top_p_B1: jax.Array) -> jax.Array:
    """Largest probability whose holders and betters sum to top_p, [B, 1]."""
    top_B1 = lax.bitcast_convert_type(p_BV.max(axis=-1, keepdims=True), jnp.int32)

    def enough(at_B1):
        kept_BV = p_BV >= lax.bitcast_convert_type(at_B1, F32)
        return jnp.sum(p_BV * kept_BV, axis=-1, keepdims=True) >= top_p_B1

    return lax.bitcast_convert_type(_bisected(enough, jnp.zeros_like(top_B1), top_B1 + 1), F32)
