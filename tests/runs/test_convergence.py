"""The verdict on logs whose truth is known: made by hand, against NumPy's line fit and SciPy-free arithmetic."""

import math
import random

import numpy as np
import pytest

from trl_ext.runs.convergence import difference, trend, verdict


def ppo_log(rewards, kls, **last):
    lines = [
        {"step": i + 1, "loss": 0.1, "reward/score": reward, "kl/ref": kl}
        for i, (reward, kl) in enumerate(zip(rewards, kls, strict=True))
    ]
    lines[-1] |= last
    return lines


def grpo_log(rewards, kls, length=10.0):
    """The same run as GRPO logs it: KL per token, with the mean length beside it."""
    return [
        {"step": i + 1, "reward": reward, "reward_std": 1.0, "kl": kl / length, "completions/mean_length": length}
        for i, (reward, kl) in enumerate(zip(rewards, kls, strict=True))
    ]


def noise(size, scale=0.1, seed=0):
    rng = random.Random(seed)
    return [rng.gauss(0, scale) for _ in range(size)]


def saturating(size=80, level=2.0):
    """Rises for a quarter of the run, then is flat."""
    return [level * min(1, 4 * i / size) + e for i, e in enumerate(noise(size))]


def dpo_log(accuracies, losses=None, pairs=400):
    lines = []
    for i, accuracy in enumerate(accuracies):
        half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / pairs)
        line = {
            "step": 10 * i,
            "eval_loss": losses[i] if losses else 0.6,
            "eval_preference/accuracy": accuracy,
            "eval_preference/accuracy_low": accuracy - half,
            "eval_preference/accuracy_high": accuracy + half,
            "eval_rewards/margins_p10": -1.0,
            "eval_rewards/margins_p90": 1.0,
        }
        lines.append(line)
    return lines


# --- PPO, GRPO


@pytest.mark.parametrize("log_of", [ppo_log, grpo_log])
def test_policy_converges_when_the_reward_is_flat_and_the_kl_in_its_band(log_of):
    said = verdict(log_of(saturating(), [1.0] * 80))
    assert said.status == "converged"
    assert "1 nats" in said.reason
    assert verdict(log_of(saturating(), [0.3] * 80)).status == "not yet"  # below the band
    assert verdict(log_of(saturating(), [3.0] * 80)).status == "not yet"  # above it, and steady
    assert verdict(log_of(saturating(), [3.0] * 80), kl_band=(2, 4)).status == "converged"


def test_policy_that_still_rises_has_not_converged():
    rising = [i / 20 + e for i, e in enumerate(noise(80))]
    said = verdict(ppo_log(rising, [1.0] * 80))
    assert (said.status, "still rises" in said.reason) == ("not yet", True)


def test_policy_that_never_rose_has_not_converged():
    said = verdict(ppo_log(noise(80), [1.0] * 80))
    assert (said.status, "where it began" in said.reason) == ("not yet", True)


@pytest.mark.parametrize("log_of", [ppo_log, grpo_log])
def test_policy_diverges_when_the_kl_leaves_its_band_and_grows(log_of):
    growing = [0.1 * i for i in range(40)]
    said = verdict(log_of(saturating(40), growing))
    assert (said.status, "and grows" in said.reason) == ("diverging", True)
    # Seen before there are rollouts enough for convergence.
    assert verdict(log_of(saturating(40)[:22], [3 + 0.1 * i for i in range(22)])).status == "diverging"


def test_policy_diverges_when_the_reward_falls_below_its_start():
    falling = [-i / 20 + e for i, e in enumerate(noise(80))]
    assert verdict(ppo_log(falling, [1.0] * 80)).status == "diverging"


@pytest.mark.parametrize("key", ["loss", "reward/score", "kl/ref", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_divergence(key, value):
    said = verdict(ppo_log([0.0] * 3, [0.0] * 3, **{key: value}))
    assert (said.status, f"`{key}`" in said.reason, "step 3" in said.reason) == ("diverging", True, True)


def test_two_windows_are_needed_to_see_convergence():
    rewards, kls = saturating(40), [1.0] * 40
    assert "39 log lines" in verdict(ppo_log(rewards[:39], kls[:39])).reason
    assert verdict(ppo_log(rewards, kls), window=10).status == "converged"


def test_without_a_kl_no_verdict():
    log = [{"step": i, "reward": r, "reward_std": 1.0} for i, r in enumerate(saturating())]
    assert "no KL" in verdict(log).reason


# --- DPO and reward models


def test_preference_converges_above_three_quarters_of_held_out_pairs():
    assert verdict(dpo_log([0.5, 0.8])).status == "converged"
    assert verdict(dpo_log([0.5, 0.75], pairs=10**6)).status == "not yet"
    assert verdict(dpo_log([0.5, 0.76])).status == "not yet"  # the interval begins below
    assert verdict(dpo_log([0.5, 0.76], pairs=10_000)).status == "converged"
    assert verdict(dpo_log([0.5, 0.8]), min_accuracy=0.8).status == "not yet"
    assert "76.0% (95% interval 71.8% to 80.2%)" in verdict(dpo_log([0.5, 0.76])).reason


def test_preference_diverges_below_chance_or_with_a_rising_loss():
    assert verdict(dpo_log([0.5, 0.4])).status == "diverging"
    assert verdict(dpo_log([0.5, 0.49])).status == "not yet"
    assert verdict(dpo_log([0.5, 0.6], losses=[0.69, 0.9])).status == "diverging"


def test_ties_before_training_are_no_verdict():
    ties = {"eval_rewards/margins_p10": 0.0, "eval_rewards/margins_p90": 0.0}
    assert "no held-out" in verdict([dpo_log([0.0])[0] | ties]).reason


@pytest.mark.parametrize("key", ["eval_rewards/accuracies", "eval_accuracy"])
def test_trls_own_keys_are_read(key):
    log = [{"step": 5, key: 0.8, key.removeprefix("eval_"): 0.9, "eval_loss": 0.4}]
    assert verdict(log).status == "converged"


def test_accuracy_of_pairs_nobody_has_counted_is_not_called_divergence():
    """`RewardTrainer` logs neither an interval nor a count; one pair in the wrong order is 0%."""
    log = [{"step": 5, "eval_accuracy": 0.0, "accuracy": 0.9, "eval_loss": 0.9}]
    said = verdict(log)
    assert (said.status, "chance" in said.reason, "interval" in said.reason) == ("not yet", False, False)


@pytest.mark.parametrize(
    "accuracy, pairs, status, words",
    [
        (0.0, 1, "not yet", "0.0% (95% interval 0.0% to 79.3%)"),
        (1.0, 1, "not yet", "of more pairs the interval may lie above 75%"),
        (1.0, 4, "not yet", "100.0% (95% interval 51.0% to 100.0%)"),
        (1.0, 16, "converged", "above 75%"),
        (0.25, 400, "diverging", "worse than chance"),
        (0.8, 400, "converged", "80.0% (95% interval 75.8% to 83.6%)"),
    ],
)
def test_pairs_are_counted_from_the_speed_of_the_evaluation(accuracy, pairs, status, words):
    """As the Trainer rounds it: 4 and 3 decimals. The intervals are Wilson's by R's prop.test(correct=FALSE)."""
    speed = {"eval_runtime": round(0.51239, 4), "eval_samples_per_second": round(pairs / 0.51239, 3)}
    said = verdict([{"step": 5, "eval_accuracy": accuracy, "eval_loss": 0.4} | speed])
    assert (said.status, words in said.reason) == (status, True), said


def test_a_log_that_says_nothing_is_not_yet():
    assert verdict([]).status == "not yet"
    assert verdict([{"step": 1, "loss": 2.0}]).status == "not yet"


# --- the statistics


def test_trend_equals_numpys_line_and_its_error():
    values = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
    (slope, _), covariance = np.polyfit(range(8), values, 1, cov="unscaled")
    residuals = np.polyval(np.polyfit(range(8), values, 1), range(8)) - values
    error = math.sqrt(covariance[0, 0] * (residuals**2).sum() / 6)
    found = trend(values)
    assert found.rise == pytest.approx(7 * slope)
    assert found.half_width == pytest.approx(7 * 1.96 * error)
    assert trend([1.0, 2.0]).half_width == math.inf


def test_difference_equals_welchs_by_hand():
    found = difference([0.0, 2.0], [5.0, 7.0, 9.0])
    assert found.rise == pytest.approx(6.0)
    assert found.half_width == pytest.approx(1.96 * math.sqrt(2 / 2 + 4 / 3))


def test_a_flat_reward_is_seldom_called_a_trend():
    """The interval holds what it says: of windows of noise, about 5% have a trend."""
    rng = random.Random(1)
    told = [trend([rng.gauss(0, 1) for _ in range(20)]) for _ in range(1000)]
    assert 30 < sum(t.is_up or t.is_down for t in told) < 90


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"kl_band": (2, 1)}, "0 <= low < high"),
        ({"kl_band": (1,)}, "two numbers"),
        ({"window": 3}, "at least 4"),
        ({"min_accuracy": 0.4}, "from 0.5"),
        ({"min_accuracy": 75}, "below 1"),
    ],
)
def test_criteria_outside_their_range_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        verdict([], **wrong)


def test_few_pairs_in_the_right_order_are_no_success_yet():
    said = verdict(dpo_log([0.5, 0.8], pairs=10))  # 55% to 100%
    assert said.status == "not yet"
    assert "80.0% (95% interval 55.2% to 104.8%)" in said.reason
