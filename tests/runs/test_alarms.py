"""Each alarm sounds for the log that it is about, and for no healthy one."""

import math

import pytest

from trl_ext.runs.alarms import RULES, alarms


HEALTHY_PPO = {
    "loss": 0.1,
    "reward/score": 1.0,
    "kl/ref": 1.0,
    "terms/entropy": 2.0,
    "policy/clip_fraction": 0.1,
    "policy/ratio_max": 3.0,
    "policy/approx_kl": 0.01,
    "value/explained_variance": 0.5,
    "value/clip_fraction": 0.1,
    "advantage/std": 1.0,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.2,
}
HEALTHY_DPO = {
    "loss": 0.5,
    "rewards/margins_p90": 1.0,
    "preference/accuracy": 0.8,
    "preference/gradient_weight": 0.3,
    "preference/length_correlation": 0.1,
    "eval_preference/calibration_error": 0.05,
    "eval_rewards/chosen_below_zero": 0.4,
}


def log_of(healthy, size=12, **changes):
    """`changes`: key with two underscores for a slash -> its values from step to step, or one value."""
    lines = [{"step": i + 1, **healthy} for i in range(size)]
    for name, values in changes.items():
        for line, value in zip(lines, values if isinstance(values, list) else [values] * size, strict=True):
            line[name.replace("__", "/")] = value
    return lines


def keys(log, **options):
    return [alarm.key for alarm in alarms(log, **options)]


def test_healthy_runs_raise_no_alarm():
    assert alarms(log_of(HEALTHY_PPO)) == []
    assert alarms(log_of(HEALTHY_DPO)) == []
    assert alarms([]) == []


@pytest.mark.parametrize("kind, healthy", [("ppo", HEALTHY_PPO), ("dpo", HEALTHY_DPO)])
def test_every_rule_sounds_beyond_its_limit_and_not_at_it(kind, healthy):
    for rule in RULES[kind]:
        step = -1e-3 if rule.below else 1e-3
        assert keys(log_of(healthy, **{rule.key.replace("/", "__"): rule.limit})) == []
        (alarm,) = alarms(log_of(healthy, **{rule.key.replace("/", "__"): rule.limit + step}))
        assert alarm.key == rule.key
        assert alarm.advice == rule.advice


def test_what_is_normal_in_the_beginning_is_no_alarm():
    assert keys(log_of(HEALTHY_PPO, size=9, value__explained_variance=-1.0)) == []
    assert keys(log_of(HEALTHY_PPO, size=10, value__explained_variance=-1.0)) == ["value/explained_variance"]


def test_only_what_is_so_lately_counts():
    early = [0.9] * 7 + [0.1] * 5
    assert keys(log_of(HEALTHY_PPO, policy__clip_fraction=early)) == []
    assert keys(log_of(HEALTHY_PPO, policy__clip_fraction=[0.1] * 7 + [0.9] * 5)) == ["policy/clip_fraction"]


def test_a_kl_above_its_band_sounds_for_ppo_and_not_for_dpo():
    """DPO's `kl/ref` is an estimate on the pairs, on another scale."""
    assert keys(log_of(HEALTHY_PPO, kl__ref=2.5)) == ["kl/ref"]
    assert keys(log_of(HEALTHY_PPO, kl__ref=2.5), kl_high=3.0) == []
    assert keys(log_of(HEALTHY_DPO, kl__ref=50.0)) == []


@pytest.mark.parametrize(
    ("size", "changes", "sounds"),
    [
        (3, {"rewards__polite__std": 0.0}, True),
        (3, {"rewards__polite__std": 3e-8, "rewards__polite__mean": 0.99}, True),  # rounding of equal numbers
        (2, {"rewards__polite__std": 0.0}, False),
        (12, {"rewards__polite__std": [0.3] * 7 + [0.0] * 5}, True),
        (12, {"rewards__polite__std": [0.0] * 11 + [0.3]}, False),
        (12, {"rewards__polite__std": [0.0] * 11 + [math.nan]}, False),
    ],
)
def test_reward_source_that_tells_no_response_from_another_sounds(size, changes, sounds):
    other = {"rewards__judge__std": 1.0}
    found = alarms(log_of(HEALTHY_PPO, size, **changes | other))
    assert [alarm.key for alarm in found if alarm.key.startswith("rewards/")] == ["rewards/polite/std"] * sounds
    assert all("`completion[-1]['content']`" in alarm.advice for alarm in found if alarm.key.startswith("rewards/"))


def test_collapsed_entropy_drifting_lengths_and_broken_numbers_sound():
    assert keys(log_of(HEALTHY_PPO, terms__entropy=[2.0] + [0.1] * 11)) == ["terms/entropy"]
    for late in (25.0, 4.0):
        lengths = [10.0] * 6 + [late] * 6
        assert keys(log_of(HEALTHY_PPO, completions__mean_length=lengths)) == ["completions/mean_length"]
    assert keys(log_of(HEALTHY_PPO, loss=[0.1] * 11 + [math.nan]))[0] == "loss"


def test_a_held_out_score_past_its_best_sounds_beyond_its_interval():
    def held_out(*scores):
        lines = [{"step": i, "eval_reward/score": s, "eval_reward/score_ci95": 0.1} for i, s in enumerate(scores)]
        return log_of(HEALTHY_PPO) + lines

    assert keys(held_out(0.0, 1.0, 0.95)) == []
    assert keys(held_out(0.0, 1.0, 0.8)) == ["eval_reward/score"]


def test_overfitting_sounds_when_only_the_training_loss_falls():
    losses = [{"step": i, "eval_loss": loss} for i, loss in enumerate((0.69, 0.5, 0.6))]
    assert keys([*log_of(HEALTHY_DPO, loss=0.3), *losses]) == ["eval_loss"]
    assert keys([*log_of(HEALTHY_DPO, loss=0.65), *losses]) == []


@pytest.mark.parametrize("correlation, sounds", [(0.6, True), (-0.6, True), (0.4, False)])
def test_a_margin_that_follows_the_length_sounds_in_both_directions(correlation, sounds):
    found = keys(log_of(HEALTHY_DPO, preference__length_correlation=correlation))
    assert (found == ["preference/length_correlation"]) is sounds


def test_ties_before_training_are_no_alarm():
    tie = {"step": 0, "eval_rewards/margins_p10": 0.0, "eval_rewards/margins_p90": 0.0}
    log = [tie | {"eval_preference/accuracy": 0.0, "eval_preference/calibration_error": 0.5}]
    assert alarms(log) == []
    assert keys([log[0] | {"eval_rewards/margins_p90": 1.0}]) == ["eval_preference/calibration_error"]


@pytest.mark.parametrize("pairs, sounds", [(1, False), (99, False), (100, True), (None, True)])
def test_calibration_of_few_pairs_is_no_alarm(pairs, sounds):
    line = {"step": 5, "eval_preference/accuracy": 1.0, "eval_preference/calibration_error": 0.5}
    log = [line | ({} if pairs is None else {"eval_preference/pairs": pairs})]
    assert keys(log) == (["eval_preference/calibration_error"] if sounds else [])


def test_grpos_keys_are_watched():
    log = [{"step": i, "reward": 1.0, "frac_reward_zero_std": 0.95, "kl": 0.5} for i in range(5)]
    log = [line | {"completions/mean_length": 10.0} for line in log]
    assert set(keys(log)) == {"kl/ref", "frac_reward_zero_std"}


@pytest.mark.parametrize(
    "changes, sounds",
    [
        ({}, None),
        ({"eval_preference/accuracy_high": 0.49, "eval_preference/accuracy": 0.45}, "eval_preference/accuracy"),
        ({"eval_preference/accuracy/web": 0.4, "eval_preference/pairs/web": 200.0}, "eval_preference/accuracy/web"),
        ({"eval_preference/accuracy/web": 0.4, "eval_preference/pairs/web": 10.0}, None),
        ({"eval_preference/accuracy/web": 0.6, "eval_preference/pairs/web": 200.0}, None),
    ],
    ids=["all right", "all pairs", "a source", "a source of few pairs", "a good source"],
)
def test_pairs_below_chance_sound_beyond_their_interval(changes, sounds):
    """Of 200 pairs 40% lie below one half by 2.8 standard errors; of 10 by 0.6."""
    line = {"step": 12, "eval_preference/accuracy": 0.8, "eval_preference/accuracy_high": 0.9} | changes
    assert keys([*log_of(HEALTHY_DPO), line]) == ([sounds] if sounds else [])


def test_of_held_out_pairs_and_those_of_training_the_correlation_held_out_counts():
    line = {"step": 12, "eval_preference/length_correlation": 0.7}
    assert keys([*log_of(HEALTHY_DPO), line]) == ["eval_preference/length_correlation"]
    assert (
        keys(
            [
                *log_of(HEALTHY_DPO, preference__length_correlation=0.7),
                line | {"eval_preference/length_correlation": 0.1},
            ]
        )
        == []
    )
