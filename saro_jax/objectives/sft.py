"""Supervised fine-tuning: the weighted negative log-likelihood of the scored tokens."""

import jax
import jax.numpy as jnp


def nll(logp_BS: jax.Array, valid_BS: jax.Array, weight_BS: jax.Array) -> jax.Array:
    """Sum of -weight * log p over the scored tokens, a scalar.

    logp_BS float32 natural logs; valid_BS 1 = scored; weight_BS the weight of each token's row. The
    caller divides by the sum of weights of the whole step, so that micro-batches of any size add up
    to the same loss (Goyal et al. 2017, section 3.1, on means of means).
    """
    return -jnp.sum(jnp.where(valid_BS, logp_BS * weight_BS, 0.0))
