"""`PreferenceAccuracyCallback` gives TRL's own trainers the interval that `DPOTrainerX` has."""

import pytest

import dpo_runs
import trl_runs
from trl_ext import PreferenceAccuracyCallback
from trl_ext.statistics import wilson_interval


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
KEYS = [f"preference/{name}" for name in ("accuracy", "accuracy_low", "accuracy_high", "pairs")]


def with_callback(trainer):
    trainer.add_callback(PreferenceAccuracyCallback())
    trainer.train()
    return trainer.state.log_history


def test_trls_dpo_gets_what_dpotrainerx_logs(tmp_path):
    """The same pairs, models and steps: the same numbers under the same keys."""
    of_trl = with_callback(trl_runs.dpo_trainer(tmp_path / "trl", max_steps=3))
    models = {"model": str(tmp_path / "trl" / "actor"), "ref_model": None, "eval_dataset": dpo_runs.tiny_pairs()}
    ours = dpo_runs.dpo_run(tmp_path / "ours", models, max_steps=3, eval_strategy="steps", eval_steps=1)
    checked = 0
    for mine, theirs in zip(ours.state.log_history, of_trl, strict=True):
        for key in [*KEYS, *(f"eval_{key}" for key in KEYS)]:
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], abs=1e-6)
                checked += 1
    assert checked == 3 * 2 * 4


def test_pairs_of_several_steps_and_micro_batches_are_counted(tmp_path):
    options = {"max_steps": 4, "logging_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    log = with_callback(trl_runs.dpo_trainer(tmp_path, **options))
    assert [line["preference/pairs"] for line in log if "preference/pairs" in line] == [8.0, 8.0]  # 2 steps × 2 × 2


def test_reward_trainers_accuracy_gets_its_interval(tmp_path, capsys):
    log = with_callback(trl_runs.reward_trainer(tmp_path))
    held_out = [line for line in log if "eval_accuracy" in line]
    assert held_out
    for line in held_out:
        low, high = wilson_interval(8 * line["eval_accuracy"], 8)
        assert line["eval_preference/accuracy_low"] == pytest.approx(low)
        assert line["eval_preference/accuracy_high"] == pytest.approx(high)
    assert "of 8 held-out pairs" in capsys.readouterr().out


def test_what_dpotrainerx_logs_is_left_alone(tmp_path):
    options = {"models": {"eval_dataset": dpo_runs.tiny_pairs(4)}, "eval_strategy": "steps", "eval_steps": 1}
    plain = dpo_runs.dpo_run(tmp_path / "plain", **options).state.log_history
    trainer = dpo_runs.dpo_trainer(tmp_path / "with", **options)
    for one, other in zip(plain, with_callback(trainer), strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one if key.startswith(("preference/", "eval_preference/")))


def test_mean_over_batches_of_other_sizes_is_not_told_as_a_share(tmp_path, capsys):
    """Six of nine pairs right in batches of eight and one say 37.5% or 87.5%: no share of nine."""
    models = {"eval_dataset": dpo_runs.tiny_pairs(9)}
    options = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    with_callback(dpo_runs.dpo_trainer(tmp_path / "trl", models, side=dpo_runs.TRLS, **options))
    assert "Step 1: about " in capsys.readouterr().out
    with_callback(dpo_runs.dpo_trainer(tmp_path / "ours", models, **options))
    assert "about" not in capsys.readouterr().out
