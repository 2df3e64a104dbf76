"""KTO: the loss of single responses that are desirable or not, against a baseline."""

import jax
import jax.numpy as jnp

from saro_jax.config import SRPOConfig


def kto(
    ratio: jax.Array, desirable: jax.Array, baseline: jax.Array | float, config: SRPOConfig
) -> jax.Array:
    """KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7; loss of each response.

    desirable: lambda_D (1 - sigmoid(beta (r - z0))); undesirable: lambda_U (1 - sigmoid(beta (z0 -
    r))). ratio r = log pi(y) - log ref(y), summed; baseline z0, a scalar that carries no gradient.
    """
    z = config.beta * (ratio - jax.lax.stop_gradient(baseline))
    good = config.desirable_weight * jax.nn.sigmoid(-z)
    bad = config.undesirable_weight * jax.nn.sigmoid(z)
    return jnp.where(desirable > 0, good, bad)


def baseline(ratios_sum: jax.Array, count: int) -> jax.Array:
    """z0 of eq. 7: the mean log-ratio of a step's mismatched responses, at least 0."""
    return jnp.maximum(ratios_sum / count, 0.0)
