"""Preference losses: golden values, TRL's formulas written out, gradients, extremes, metrics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.config import SRPOConfig
from saro_jax.objectives import preference
from saro_jax.objectives.preference import Pairs

CONFIGS = {
    "sigmoid": SRPOConfig(loss="sigmoid", beta=0.1),
    "cdpo": SRPOConfig(loss="sigmoid", beta=0.1, label_smoothing=0.2),
    "robust": SRPOConfig(loss="robust", beta=0.1, label_smoothing=0.2),
    "ipo": SRPOConfig(loss="ipo", beta=0.1),
}
# A pair whose every number differs: chosen ratio 3 over 4 tokens, rejected ratio -2 over 10.
PAIR = {
    "chosen": -12.0,
    "rejected": -31.0,
    "reference_chosen": -15.0,
    "reference_rejected": -29.0,
    "tokens_chosen": 4.0,
    "tokens_rejected": 10.0,
}


def pairs(**changes: float) -> Pairs:
    values = PAIR | changes
    return Pairs(*(jnp.asarray([values[name]], jnp.float32) for name in Pairs._fields))


def loss(config: SRPOConfig, **changes: float) -> float:
    return float(preference.losses(pairs(**changes), config)[0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def by_hand(name: str, values: dict[str, float], beta: float, eps: float) -> float:
    """TRL's formulas (cDPO: Mitchell's), in double precision."""
    chosen = values["chosen"] - values["reference_chosen"]
    rejected = values["rejected"] - values["reference_rejected"]
    delta = chosen - rejected
    if name == "sigmoid":
        return -log_sigmoid(beta * delta)
    if name == "cdpo":
        return -(1 - eps) * log_sigmoid(beta * delta) - eps * log_sigmoid(-beta * delta)
    if name == "robust":
        clean = -(1 - eps) * log_sigmoid(beta * delta)
        flipped = -eps * log_sigmoid(-beta * delta)
        return (clean - flipped) / (1 - 2 * eps)
    mean = chosen / values["tokens_chosen"] - rejected / values["tokens_rejected"]
    return (mean - 1 / (2 * beta)) ** 2


# margin 5, beta 0.1: log sigmoid(0.5) = -0.4740770, log sigmoid(-0.5) = -0.9740770;
# mean margin 3 / 4 + 2 / 10 = 0.95, 1 / (2 beta) = 5.
@pytest.mark.parametrize(
    ("name", "golden"),
    [("sigmoid", 0.4740770), ("cdpo", 0.5740770), ("robust", 0.3074103), ("ipo", 16.4025)],
)
def test_golden_values(name: str, golden: float):
    assert loss(CONFIGS[name]) == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chosen", [-40.0, -17.0, -12.0, -3.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("eps", [0.05, 0.45])
def test_losses_are_the_published_formulas(name: str, chosen: float, beta: float, eps: float):
    smoothed = name in ("cdpo", "robust")
    config = SRPOConfig(
        loss=CONFIGS[name].loss, beta=beta, label_smoothing=eps if smoothed else 0.0
    )
    expected = by_hand(name, PAIR | {"chosen": chosen}, beta, eps)
    assert loss(config, chosen=chosen) == pytest.approx(expected, rel=2e-6, abs=1e-6)


def test_the_three_uses_of_label_smoothing_differ():
    values = [loss(CONFIGS[name]) for name in ("sigmoid", "cdpo", "robust")]
    assert len({round(value, 4) for value in values}) == 3


def test_robust_is_unbiased_under_flips():
    # The expectation over a label that is flipped with probability eps is the plain loss.
    z, eps = 0.7, 0.2
    kept, flipped = (float(preference.robust(jnp.float32(x), 1.0, eps)) for x in (z, -z))
    assert (1 - eps) * kept + eps * flipped == pytest.approx(-log_sigmoid(z), rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_of_the_loss_is_read(name: str):
    config = CONFIGS[name]
    assert loss(config.model_copy(update={"beta": 0.2})) != loss(config)
    if config.label_smoothing:
        assert loss(config.model_copy(update={"label_smoothing": 0.1})) != loss(config)


def test_beta_enters_once():
    # Twice the temperature is twice the margin: 5 -> 10 by the chosen branch.
    twice = SRPOConfig(loss="sigmoid", beta=0.2)
    assert loss(twice) == pytest.approx(loss(CONFIGS["sigmoid"], chosen=-7.0), rel=1e-6)


def test_same_policy_and_reference_give_ln_2():
    same = {"reference_chosen": -12.0, "reference_rejected": -31.0}
    for name in ("sigmoid", "cdpo", "robust"):
        assert loss(CONFIGS[name], **same) == pytest.approx(math.log(2), rel=1e-6)
    assert loss(CONFIGS["ipo"], **same) == pytest.approx(25.0, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("field", ["chosen", "rejected", "reference_chosen", "reference_rejected"])
def test_gradient_equals_the_finite_difference(name: str, field: str):
    config, step = CONFIGS[name], 1e-4
    smoothing = config.label_smoothing
    gradient = jax.grad(lambda p: preference.losses(p, config).sum())(pairs())
    ahead, behind = (
        by_hand(name, PAIR | {field: PAIR[field] + sign * step}, 0.1, smoothing) for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    assert float(getattr(gradient, field)[0]) == pytest.approx(slope, rel=1e-4)


def test_gradient_of_dpo_is_beta_times_sigmoid_of_minus_the_reward_margin():
    gradient = jax.grad(lambda p: preference.losses(p, CONFIGS["sigmoid"]).sum())(pairs())
    size = 0.1 / (1 + math.exp(0.1 * 5.0))
    signs = {"chosen": -1, "rejected": 1, "reference_chosen": 1, "reference_rejected": -1}
    for field, sign in signs.items():
        assert float(getattr(gradient, field)[0]) == pytest.approx(sign * size, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_extreme_margins_stay_finite(name: str, margin: float, beta: float):
    config = CONFIGS[name].model_copy(update={"beta": beta})
    extreme = pairs(
        chosen=margin / 2, reference_chosen=0.0, rejected=-margin / 2, reference_rejected=0.0
    )
    value, gradient = jax.value_and_grad(lambda p: preference.losses(p, config).sum())(extreme)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    if name == "sigmoid":  # and it is the right number: linear where wrong, 0 where right
        assert float(value) == pytest.approx(max(0.0, -beta * margin), rel=1e-6)
        assert float(gradient.chosen[0]) == pytest.approx(-beta if margin < 0 else 0.0, abs=1e-6)


def test_sums_grow_with_the_length_of_an_answer_and_means_do_not():
    names = [name for name in PAIR if name != "beta"]
    doubled = {name: 2 * PAIR[name] for name in names}
    config = CONFIGS["sigmoid"]
    assert loss(config, **doubled) == pytest.approx(-log_sigmoid(0.1 * 10.0), rel=1e-6)
    assert loss(CONFIGS["ipo"], **doubled) == pytest.approx(loss(CONFIGS["ipo"]), rel=1e-6)


def test_tokens_that_both_answers_share_cancel_in_sums():
    shared = {name: PAIR[name] - 8.0 for name in ("chosen", "rejected")}
    shared |= {name: PAIR[name] - 6.5 for name in ("reference_chosen", "reference_rejected")}
    for name in ("sigmoid", "cdpo", "robust"):
        assert loss(CONFIGS[name], **shared) == pytest.approx(loss(CONFIGS[name]), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_slot_is_finite(name: str):
    # Slots of a row that hold no pair: all zeros, no token. Their gradient must not become NaN.
    zeros = Pairs(*(jnp.zeros(3, jnp.float32) for _ in Pairs._fields))
    value, gradient = jax.value_and_grad(lambda p: preference.losses(p, CONFIGS[name]).sum())(zeros)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_each_pair_has_its_own_loss():
    both = Pairs(*(jnp.concatenate(two) for two in zip(pairs(), pairs(chosen=-20.0), strict=True)))
    found = preference.losses(both, CONFIGS["sigmoid"])
    expected = [loss(CONFIGS["sigmoid"]), loss(CONFIGS["sigmoid"], chosen=-20.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_metrics_are_trls():
    found = {name: float(value[0]) for name, value in preference.metrics(pairs(), 0.1).items()}
    assert found == pytest.approx(
        {
            "rewards/chosen": 0.3,
            "rewards/rejected": -0.2,
            "rewards/margins": 0.5,
            "rewards/accuracies": 1.0,
            "logps/chosen": -12.0,
            "logps/rejected": -31.0,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize(("chosen", "accuracy"), [(-14.0, 1.0), (-17.0, 0.5), (-18.0, 0.0)])
def test_ties_count_one_half(chosen: float, accuracy: float):
    # The rejected ratio is -2, so chosen = -17 with reference -15 is a tie.
    found = preference.metrics(pairs(chosen=chosen), 0.1)["rewards/accuracies"]
    assert found.tolist() == [accuracy]
