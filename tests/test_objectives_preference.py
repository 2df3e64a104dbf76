"""Preference losses: golden values, TRL's formulas written out, gradients, extremes, metrics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saro_jax.config import SRPOConfig
from saro_jax.objectives import preference
from saro_jax.objectives.kto import baseline, kto
from saro_jax.objectives.preference import Pairs

CONFIGS = {
    "sigmoid": SRPOConfig(loss="sigmoid", beta=0.1),
    "cdpo": SRPOConfig(loss="sigmoid", beta=0.1, label_smoothing=0.2),
    "robust": SRPOConfig(loss="robust", beta=0.1, label_smoothing=0.2),
    "hinge": SRPOConfig(loss="hinge", beta=0.1),
    "identity_po": SRPOConfig(loss="identity_po", beta=0.1),
    "apo_zero": SRPOConfig(loss="apo_zero", beta=0.1),
    "apo_down": SRPOConfig(loss="apo_down", beta=0.1),
    "simpo": SRPOConfig(loss="simpo", beta=0.1, target_margin=0.3),
    "orpo": SRPOConfig(loss="orpo", beta=0.1),
    "rpo": SRPOConfig(loss="sigmoid", beta=0.1, nll_weight=0.5),
    "mean": SRPOConfig(loss="sigmoid", beta=0.1, length="mean"),
}
REFERENCE_FREE = ("simpo", "orpo")
# A pair whose every number differs: chosen ratio 3 over 4 tokens, rejected ratio -2 over 10.
PAIR = {
    "chosen": -12.0,
    "rejected": -31.0,
    "reference_chosen": -15.0,
    "reference_rejected": -29.0,
    "tokens_chosen": 4.0,
    "tokens_rejected": 10.0,
}


def pairs(noise: float = 0.0, **changes: float) -> Pairs:
    """Everything in the first segment."""
    values = PAIR | changes
    fields = (jnp.asarray([[values[name], 0, 0, 0]], jnp.float32) for name in PAIR)
    return Pairs(*fields, noise=jnp.full(1, noise, jnp.float32))


def loss(config: SRPOConfig, **changes: float) -> float:
    return float(preference.losses(pairs(config.label_smoothing, **changes), config)[0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def sigmoid(x: float) -> float:
    return math.exp(log_sigmoid(x))


def by_hand(name: str, values: dict[str, float], beta: float, eps: float) -> float:
    """The published formulas in double precision."""
    chosen = values["chosen"] - values["reference_chosen"]
    rejected = values["rejected"] - values["reference_rejected"]
    delta = chosen - rejected
    mean = chosen / values["tokens_chosen"] - rejected / values["tokens_rejected"]
    mean_chosen = values["chosen"] / values["tokens_chosen"]
    mean_rejected = values["rejected"] / values["tokens_rejected"]
    if name == "sigmoid":
        return -log_sigmoid(beta * delta)
    if name == "cdpo":
        return -(1 - eps) * log_sigmoid(beta * delta) - eps * log_sigmoid(-beta * delta)
    if name == "robust":
        clean = -(1 - eps) * log_sigmoid(beta * delta)
        flipped = -eps * log_sigmoid(-beta * delta)
        return (clean - flipped) / (1 - 2 * eps)
    if name == "hinge":
        return max(0.0, 1 - beta * delta)
    if name == "identity_po":
        return (mean - 1 / (2 * beta)) ** 2
    if name == "apo_zero":
        return 1 - sigmoid(beta * chosen) + sigmoid(beta * rejected)
    if name == "apo_down":
        return sigmoid(beta * chosen) + 1 - sigmoid(beta * delta)
    if name == "simpo":
        return -log_sigmoid(beta * (mean_chosen - mean_rejected) - 0.3)
    if name == "orpo":
        odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (mean_chosen, mean_rejected)]
        return -mean_chosen - beta * log_sigmoid(odds[0] - odds[1])
    if name == "rpo":
        return -log_sigmoid(beta * delta) - 0.5 * mean_chosen
    assert name == "mean"
    return -log_sigmoid(beta * mean)


# margin 5, beta 0.1: log sigmoid(0.5) = -0.4740770, log sigmoid(-0.5) = -0.9740770;
# mean margin 3 / 4 + 2 / 10 = 0.95, 1 / (2 beta) = 5; means of log-probs -3 and -3.1.
@pytest.mark.parametrize(
    ("name", "golden"),
    [
        ("sigmoid", 0.4740770),
        ("cdpo", 0.5740770),
        ("robust", 0.3074103),
        ("hinge", 0.5),
        ("identity_po", 16.4025),
        ("apo_zero", 0.8757235),  # 1 - s(0.3) + s(-0.2)
        ("apo_down", 0.9519835),  # s(0.3) + 1 - s(0.5)
        ("simpo", 0.8486230),  # -log s(0.01 - 0.3)
        ("rpo", 1.9740770),  # the first, and 0.5 * 12 / 4
        ("mean", 0.6467749),  # -log s(0.095)
    ],
)
def test_golden_values(name: str, golden: float):
    assert loss(CONFIGS[name]) == pytest.approx(golden, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chosen", [-40.0, -17.0, -12.0, -3.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("eps", [0.05, 0.45])
def test_losses_are_the_published_formulas(name: str, chosen: float, beta: float, eps: float):
    smoothed = name in ("cdpo", "robust")
    changes = {"beta": beta, "label_smoothing": eps if smoothed else 0.0}
    config = CONFIGS[name].model_copy(update=changes)
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
    assert loss(CONFIGS["identity_po"], **same) == pytest.approx(25.0, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("field", ["chosen", "rejected", "reference_chosen", "reference_rejected"])
def test_gradient_equals_the_finite_difference(name: str, field: str):
    config, step = CONFIGS[name], 1e-4
    smoothing = config.label_smoothing
    gradient = jax.grad(lambda p: preference.losses(p, config).sum())(pairs(smoothing))
    ahead, behind = (
        by_hand(name, PAIR | {field: PAIR[field] + sign * step}, 0.1, smoothing) for sign in (1, -1)
    )
    slope = (ahead - behind) / (2 * step)
    assert float(getattr(gradient, field)[0, 0]) == pytest.approx(slope, rel=1e-4, abs=1e-7)
    used = not (name in REFERENCE_FREE and field.startswith("reference"))
    assert (slope != 0) == used


def test_gradient_of_dpo_is_beta_times_sigmoid_of_minus_the_reward_margin():
    gradient = jax.grad(lambda p: preference.losses(p, CONFIGS["sigmoid"]).sum())(pairs())
    size = 0.1 / (1 + math.exp(0.1 * 5.0))
    signs = {"chosen": -1, "rejected": 1, "reference_chosen": 1, "reference_rejected": -1}
    for field, sign in signs.items():
        assert float(getattr(gradient, field)[0, 0]) == pytest.approx(sign * size, rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("beta", [0.1, 10.0])
def test_extreme_margins_stay_finite(name: str, margin: float, beta: float):
    config = CONFIGS[name].model_copy(update={"beta": beta})
    extreme = pairs(
        config.label_smoothing,
        chosen=margin / 2,
        reference_chosen=0.0,
        rejected=-margin / 2,
        reference_rejected=0.0,
    )
    value, gradient = jax.value_and_grad(lambda p: preference.losses(p, config).sum())(extreme)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradient)
    if name == "sigmoid":  # and it is the right number: linear where wrong, 0 where right
        assert float(value) == pytest.approx(max(0.0, -beta * margin), rel=1e-6)
        assert float(gradient.chosen[0, 0]) == pytest.approx(-beta if margin < 0 else 0.0, abs=1e-6)


def test_sums_grow_with_the_length_of_an_answer_and_means_do_not():
    names = [name for name in PAIR if name != "beta"]
    doubled = {name: 2 * PAIR[name] for name in names}
    config = CONFIGS["sigmoid"]
    assert loss(config, **doubled) == pytest.approx(-log_sigmoid(0.1 * 10.0), rel=1e-6)
    assert loss(CONFIGS["identity_po"], **doubled) == pytest.approx(
        loss(CONFIGS["identity_po"]), rel=1e-6
    )


def test_tokens_that_both_answers_share_cancel_in_sums():
    shared = {name: PAIR[name] - 8.0 for name in ("chosen", "rejected")}
    shared |= {name: PAIR[name] - 6.5 for name in ("reference_chosen", "reference_rejected")}
    for name in ("sigmoid", "cdpo", "robust"):
        assert loss(CONFIGS[name], **shared) == pytest.approx(loss(CONFIGS[name]), rel=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_empty_slot_is_finite(name: str):
    # Slots of a row that hold no pair: all zeros, no token. Their gradient must not become NaN.
    zeros = Pairs(*(jnp.zeros((3, 4), jnp.float32) for _ in PAIR), noise=jnp.zeros(3))
    value, gradient = jax.value_and_grad(lambda p: preference.losses(p, CONFIGS[name]).sum())(zeros)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_each_pair_has_its_own_loss():
    both = Pairs(*(jnp.concatenate(two) for two in zip(pairs(), pairs(chosen=-20.0), strict=True)))
    found = preference.losses(both, CONFIGS["sigmoid"])
    expected = [loss(CONFIGS["sigmoid"]), loss(CONFIGS["sigmoid"], chosen=-20.0)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_metrics_are_trls():
    found = {
        name: float(value[0])
        for name, value in preference.metrics(pairs(), CONFIGS["sigmoid"]).items()
    }
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
    found = preference.metrics(pairs(chosen=chosen), CONFIGS["sigmoid"])["rewards/accuracies"]
    assert found.tolist() == [accuracy]


def test_rewards_without_a_reference_are_means_of_log_probs():
    found = preference.metrics(pairs(), CONFIGS["simpo"])
    assert float(found["rewards/chosen"][0]) == pytest.approx(-0.3, rel=1e-6)
    assert float(found["rewards/rejected"][0]) == pytest.approx(-0.31, rel=1e-6)
    assert float(found["logps/chosen"][0]) == -12.0


# ---- segments: parts and lengths -----------------------------------------------------------------

# Per segment: reasoning within and beyond the shorter branch, answer within and beyond it.
CHOSEN, REJECTED = [1.0, 0.0, 2.0, 0.0], [0.5, -1.0, -2.0, 3.0]


def segmented(**settings) -> float:
    zeros = jnp.zeros((1, 4), jnp.float32)
    tokens = jnp.asarray([[2.0, 0, 3.0, 0]]), jnp.asarray([[1.0, 2, 4.0, 3]])
    both = (jnp.asarray([row]) for row in (CHOSEN, REJECTED))
    chosen, rejected = both
    one = Pairs(chosen, rejected, zeros, zeros, *tokens, noise=jnp.zeros(1))
    return float(preference.losses(one, SRPOConfig.model_validate(settings | {"beta": 1.0}))[0])


@pytest.mark.parametrize(
    ("settings", "margin"),
    [
        ({}, 3.0 - 0.5),
        ({"reasoning_weight": 2.0}, (2 + 2) - (1 - 2 - 2 + 3)),
        ({"answer_weight": 0.0}, 1 - (0.5 - 1)),
        ({"length": "desensitised", "length_alpha": 0.0}, 3 - (0.5 - 2)),
        ({"length": "desensitised", "length_alpha": 0.25}, 3 - (0.5 - 0.25 - 2 + 0.75)),
        ({"length": "mean"}, 3 / 5 - 0.5 / 10),
        ({"length": "mean", "reasoning_weight": 0.0}, 2 / 5 - 1 / 10),
        (
            {"length": "desensitised", "length_alpha": 0.5, "answer_weight": 3.0},
            1 + 6 - (0.5 - 0.5 + 3 * (-2 + 1.5)),
        ),
    ],
)
def test_parts_and_lengths_weigh_the_log_ratio(settings, margin: float):
    assert segmented(**settings) == pytest.approx(-log_sigmoid(margin), rel=1e-6)
    assert segmented(**settings, loss="hinge") == pytest.approx(max(0, 1 - margin), abs=1e-6)


def test_a_row_s_noise_is_its_own():
    two = Pairs(*(jnp.concatenate([x, x]) for x in pairs()))
    noisy = two._replace(noise=jnp.asarray([0.0, 0.2]))
    for name, plain in (("sigmoid", "cdpo"), ("robust", "robust")):
        found = preference.losses(noisy, CONFIGS[name])
        np.testing.assert_allclose(found, [loss(CONFIGS["sigmoid"]), loss(CONFIGS[plain])], 1e-6)


# ---- unpaired ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "z0"), [(3.0, 1.0), (-2.0, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("desirable", [True, False])
def test_kto_is_the_published_formula_and_its_baseline_has_no_gradient(ratio, z0, desirable):
    config = SRPOConfig(loss="kto", beta=0.1, desirable_weight=2.0, undesirable_weight=0.5)

    def value(r, z):
        return kto(r, jnp.asarray(float(desirable)), z, config)

    sign, weight = (1, 2.0) if desirable else (-1, 0.5)
    inner = sigmoid(0.1 * sign * (ratio - z0))
    arguments = jnp.float32(ratio), jnp.float32(z0)
    assert float(value(*arguments)) == pytest.approx(weight * (1 - inner), rel=1e-6)
    slopes = jax.grad(value, (0, 1))(*arguments)
    assert float(slopes[0]) == pytest.approx(-sign * 0.1 * weight * inner * (1 - inner), rel=1e-5)
    assert float(slopes[1]) == 0.0


@pytest.mark.parametrize("ratio", [1e4, -1e4])
def test_kto_is_finite_at_extremes(ratio: float):
    config = SRPOConfig(loss="kto", beta=10.0)
    for label in (0.0, 1.0):
        found = jax.value_and_grad(lambda r, y=label: kto(r, jnp.asarray(y), 0.0, config))(ratio)
        assert np.isfinite(found).all()


def test_the_baseline_is_a_mean_of_at_least_zero():
    assert float(baseline(jnp.asarray(6.0), 4)) == 1.5
    assert float(baseline(jnp.asarray(-6.0), 4)) == 0.0
