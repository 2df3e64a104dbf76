"""Pairwise preference losses: pure functions of log-probs.

Legend: P pairs (any shape of leading axes), G segments of a branch.

A branch's log-probs come as sums over four segments: segment 2 * part + beyond, where part is 0 for
reasoning (through `</think>`) and 1 for the answer, and beyond is 1 for tokens past the length of
the pair's shorter branch. Weights of segments give every length and part setting from sums that
no setting changes. In the formulas w is the chosen branch and l the rejected one,
  r = log pi(y) - log ref(y)  and  h = r_w - r_l,
so beta enters exactly once, in the loss.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from saro_jax.config import SRPOConfig

SEGMENTS = 4  # of a branch: 2 * part + beyond
REFERENCE_FREE = ("simpo", "orpo")


class Pairs(NamedTuple):
    """Float32 [P, G]: summed log-probs and number of scored tokens; noise [P]."""

    chosen: jax.Array
    rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    tokens_chosen: jax.Array
    tokens_rejected: jax.Array
    noise: jax.Array  # probability that the label is flipped, in [0, 1/2)


def sigmoid(margin: jax.Array, beta: float, label_smoothing: jax.Array | float = 0.0) -> jax.Array:
    """DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with label smoothing eps it is cDPO:

    -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)   (Mitchell 2023, "A note on DPO").
    """
    z = beta * margin
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(z) - label_smoothing * jax.nn.log_sigmoid(-z)


def robust(margin: jax.Array, beta: float, label_smoothing: jax.Array | float) -> jax.Array:
    """Robust DPO, Chowdhury et al. 2024 (arXiv 2403.00409), eq. 12: unbiased under label flips.

    [-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)] / (1 - 2 eps), eps < 1/2.
    """
    z = beta * margin
    eps = label_smoothing
    signed = -(1 - eps) * jax.nn.log_sigmoid(z) + eps * jax.nn.log_sigmoid(-z)
    return signed / (1 - 2 * eps)


def hinge(margin: jax.Array, beta: float) -> jax.Array:
    """SLiC, Zhao et al. 2023 (arXiv 2305.10425), on log-ratios: max(0, 1 - beta h)."""
    return jax.nn.relu(1 - beta * margin)


def identity_po(mean_margin: jax.Array, beta: float) -> jax.Array:
    """Identity PO, Azar et al. 2023 (arXiv 2310.12036), eq. 17: (h - 1 / (2 beta))^2.

    h is taken of log-probs *averaged* over the tokens of each branch, as its authors confirmed.
    """
    return jnp.square(mean_margin - 1 / (2 * beta))


def apo_zero(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """APO-zero, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7: chosen up, rejected down.

    1 - sigmoid(beta r_w) + sigmoid(beta r_l)
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: jax.Array, rejected: jax.Array, beta: float) -> jax.Array:
    """APO-down, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8: both down, rejected more.

    sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l))
    """
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def simpo(mean_margin: jax.Array, beta: float, target_margin: float) -> jax.Array:
    """SimPO, Meng et al. 2024 (arXiv 2405.14734), eq. 6: -log sigmoid(beta m - gamma).

    m is the difference of the branches' mean log-probs under the policy: there is no reference.
    """
    return -jax.nn.log_sigmoid(beta * mean_margin - target_margin)


def orpo(mean_chosen: jax.Array, mean_rejected: jax.Array, weight: float) -> jax.Array:
    """ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7, of mean log-probs (no reference).

    -log p_w - weight log sigmoid(log odds(p_w) - log odds(p_l)), odds(p) = p / (1 - p).
    """
    log_odds = mean_chosen - _log1mexp(mean_chosen) - (mean_rejected - _log1mexp(mean_rejected))
    return -mean_chosen - weight * jax.nn.log_sigmoid(log_odds)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x < 0, by the form that keeps its digits (Maechler 2012)."""
    x = jnp.minimum(x, -1e-6)  # p = 1 has infinite odds
    return jnp.where(x > -0.6931472, jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def segment_weights(config: SRPOConfig) -> jax.Array:
    """Weight of each segment in a branch's log-ratio, float32 [G].

    Parts as in AW-DPO, reasoning and answer. Tokens beyond the shorter branch count alpha in
    length-desensitised DPO, Liu et al. 2024 (arXiv 2409.06411).
    """
    beyond = config.length_alpha if config.length == "desensitised" else 1.0
    parts = jnp.asarray([config.reasoning_weight, config.answer_weight], jnp.float32)
    return jnp.outer(parts, jnp.asarray([1.0, beyond], jnp.float32)).ravel()


def losses(pairs: Pairs, config: SRPOConfig) -> jax.Array:
    """Loss of each pair, [P], by `config.loss`; finite for any finite log-probs.

    With nll_weight gamma it is RPO, Pang et al. 2024 (arXiv 2404.19733), eq. 1: the loss plus gamma
    times the chosen branch's negative log-likelihood over its length.
    """
    loss, beta = config.loss, config.beta
    length_chosen = jnp.maximum(pairs.tokens_chosen.sum(-1), 1.0)
    length_rejected = jnp.maximum(pairs.tokens_rejected.sum(-1), 1.0)
    mean_chosen = pairs.chosen.sum(-1) / length_chosen
    if loss in REFERENCE_FREE:
        mean_rejected = pairs.rejected.sum(-1) / length_rejected
        if loss == "orpo":
            return orpo(mean_chosen, mean_rejected, beta)
        out = simpo(mean_chosen - mean_rejected, beta, config.target_margin)
    else:
        weights = segment_weights(config)
        chosen = ((pairs.chosen - pairs.reference_chosen) * weights).sum(-1)
        rejected = ((pairs.rejected - pairs.reference_rejected) * weights).sum(-1)
        if config.length == "mean" or loss == "identity_po":
            chosen, rejected = chosen / length_chosen, rejected / length_rejected
        if loss == "sigmoid":
            out = sigmoid(chosen - rejected, beta, pairs.noise)
        elif loss == "robust":
            out = robust(chosen - rejected, beta, pairs.noise)
        elif loss == "hinge":
            out = hinge(chosen - rejected, beta)
        elif loss == "identity_po":
            out = identity_po(chosen - rejected, beta)
        elif loss == "apo_zero":
            out = apo_zero(chosen, rejected, beta)
        else:
            assert loss == "apo_down", loss
            out = apo_down(chosen, rejected, beta)
    if config.nll_weight:
        out = out - config.nll_weight * mean_chosen
    return out


def metrics(pairs: Pairs, config: SRPOConfig) -> dict[str, jax.Array]:
    """Per pair, under TRL's names: rewards (beta times the log ratio), accuracies, log-probs.

    A reward is DPO's implicit one, of the sums over what is scored, whatever weights the loss gives
    to parts and lengths; without a reference it is beta times the mean log-prob. A tie counts one
    half: at step 0 every pair is one.
    """
    logp_chosen, logp_rejected = pairs.chosen.sum(-1), pairs.rejected.sum(-1)
    if config.loss in REFERENCE_FREE:
        chosen = config.beta * logp_chosen / jnp.maximum(pairs.tokens_chosen.sum(-1), 1.0)
        rejected = config.beta * logp_rejected / jnp.maximum(pairs.tokens_rejected.sum(-1), 1.0)
    else:
        chosen = config.beta * (pairs.chosen - pairs.reference_chosen).sum(-1)
        rejected = config.beta * (pairs.rejected - pairs.reference_rejected).sum(-1)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
        "logps/chosen": logp_chosen,
        "logps/rejected": logp_rejected,
    }
