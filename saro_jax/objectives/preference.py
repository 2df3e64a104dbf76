"""Preference losses: pure functions of log-probs.

All take float32 arrays of one entry per pair: summed log-probs of the chosen and rejected branch
under the policy and the reference. `margin` below is
  h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)),
so beta enters exactly once, in the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saro_jax.config import SRPOConfig


class Pairs(NamedTuple):
    """Per pair, float32 [P]: summed log-probs, and the number of scored tokens of each branch."""

    chosen: jax.Array
    rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    tokens_chosen: jax.Array
    tokens_rejected: jax.Array


def sigmoid(margin: jax.Array, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with label smoothing eps it is cDPO:

    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)   (Mitchell 2023, "A note on DPO").
    """
    z = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust(margin: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12: unbiased under label flips.

    [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps), eps < 1/2.
    """
    z = beta * margin
    eps = label_smoothing
    signed = -(1 - eps) * jax.nn.log_sigmoid(z) + eps * jax.nn.log_sigmoid(-z)
    return signed / (1 - 2 * eps)


def ipo(mean_margin: jax.Array, beta: float) -> jax.Array:
    """Identity PO, Azar et al. 2023 (arXiv 2310.12036), eq. 17: (h - 1 / (2 beta))^2.

    h is taken of log-probs *averaged* over the tokens of each branch, as its authors confirmed.
    """
    return jnp.square(mean_margin - 1 / (2 * beta))


def losses(pairs: Pairs, config: SRPOConfig) -> jax.Array:
    """Loss of each pair, [P], by `config.loss`; finite for any finite log-probs."""
    chosen = pairs.chosen - pairs.reference_chosen
    rejected = pairs.rejected - pairs.reference_rejected
    if config.loss == "sigmoid":
        return sigmoid(chosen - rejected, config.beta, config.label_smoothing)
    if config.loss == "robust":
        return robust(chosen - rejected, config.beta, config.label_smoothing)
    length_chosen = jnp.maximum(pairs.tokens_chosen, 1.0)
    length_rejected = jnp.maximum(pairs.tokens_rejected, 1.0)
    return ipo(chosen / length_chosen - rejected / length_rejected, config.beta)


def metrics(pairs: Pairs, beta: float) -> dict[str, jax.Array]:
    """Per pair, under TRL's names: rewards (beta times the log ratio), accuracies, log-probs.

    A tie counts one half: at step 0 every pair is one.
    """
    chosen = beta * (pairs.chosen - pairs.reference_chosen)
    rejected = beta * (pairs.rejected - pairs.reference_rejected)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
