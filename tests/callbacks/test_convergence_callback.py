"""`ConvergenceCallback` says what the pure verdict says, and stops the runs that it is told to stop."""

from types import SimpleNamespace

import pytest

import ppo_runs
import trl_runs
from trl_ext import ConvergenceCallback
from trl_ext.runs.convergence import verdict


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def play(callback, log):
    """The callback sees a log grow line by line; the step after which it stopped, if it did."""
    state = SimpleNamespace(log_history=[], global_step=0, is_world_process_zero=True)
    control = SimpleNamespace(should_training_stop=False)
    callback.on_train_begin(None, state, control)
    for line in log:
        state.log_history.append(line)
        state.global_step = line["step"]
        callback.on_log(None, state, control)
        if control.should_training_stop:
            return line["step"]
    return None


def pairs_log(*accuracies):
    """Evaluations of 400 pairs."""
    speed = {"eval_runtime": 4.0, "eval_samples_per_second": 100.0}
    steps = range(10, 10 * len(accuracies) + 1, 10)
    return [
        {"step": step, "eval_rewards/accuracies": a, "eval_loss": 0.5} | speed
        for step, a in zip(steps, accuracies, strict=True)
    ]


def test_callback_reports_a_change_of_status_once_and_goes_on(capsys):
    callback = ConvergenceCallback()
    assert play(callback, pairs_log(0.6, 0.7, 0.8, 0.81)) is None
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["Step 10", "Step 30"]
    assert "converged: 80.0%" in printed[1]
    assert callback.verdict == verdict(pairs_log(0.6, 0.7, 0.8, 0.81))


@pytest.mark.parametrize(
    "stop_when, log, stopped",
    [
        ("converged", pairs_log(0.6, 0.8, 0.9), 20),
        (("converged", "diverging"), pairs_log(0.6, 0.8, 0.9), 20),
        ("diverging", pairs_log(0.6, 0.8, 0.9), None),
        ("diverging", pairs_log(0.6, 0.3, 0.9), 20),
        ("diverging", [{"step": 1, "reward": 0.0, "kl": float("nan")}], 1),
    ],
)
def test_callback_stops_when_told(stop_when, log, stopped, capsys):
    assert play(ConvergenceCallback(stop_when), log) == stopped
    assert ("The run stops here" in capsys.readouterr().out) is (stopped is not None)


def test_criteria_of_the_callback_are_read():
    callback = ConvergenceCallback("converged", min_accuracy=0.85)
    assert play(callback, pairs_log(0.6, 0.8, 0.9)) == 30


RUNS_AWAY = {"window": 4, "kl_band": (0, 1e-3)}
FEW_PAIRS = {"min_accuracy": 0.5}  # the held-out ones are too few for the interval of 0.75


def stops_early(trainer, **criteria):
    """A run whose held-out accuracy or whose KL decides; the callback, and the step at which it stopped."""
    callback = ConvergenceCallback(**criteria)
    trainer.add_callback(callback)
    trainer.train()
    return callback, trainer.state.global_step


@pytest.mark.parametrize(
    "make, options, status, criteria",
    [
        (ppo_runs.ppo_trainer, {"total_episodes": 200, "num_ppo_epochs": 1, "kl_coef": 1e-6}, "diverging", RUNS_AWAY),
        (trl_runs.grpo_trainer, {"max_steps": 40, "beta": 1e-6}, "diverging", RUNS_AWAY),
        (trl_runs.dpo_trainer, {"max_steps": 40, "learning_rate": 5.0}, "converged", FEW_PAIRS),
    ],
)
def test_run_stops_when_its_kl_runs_away_or_the_pairs_are_learnt(tmp_path, make, options, status, criteria):
    callback, stopped = stops_early(make(tmp_path, **{"learning_rate": 0.1} | options), stop_when=status, **criteria)
    assert callback.verdict.status == status
    assert stopped < 40


def test_trls_reward_run_is_judged(tmp_path):
    callback, _ = stops_early(trl_runs.reward_trainer(tmp_path))
    assert "held-out pairs" in callback.verdict.reason


@pytest.mark.parametrize(
    "wrong, match",
    [({"stop_when": "not yet"}, "choose from"), ({"stop_when": ["bad"]}, "'bad'"), ({"window": 2}, "at least 4")],
)
def test_callback_refuses_what_means_nothing(wrong, match):
    with pytest.raises(ValueError, match=match):
        ConvergenceCallback(**wrong)
