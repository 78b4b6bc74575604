"""`KLControlCallback` moves GRPO's `beta` as the controllers' formulas say, and ends runs that leave the reference."""

import pytest

import ppo_runs
import trl_runs
from trl_ext import KLControlCallback
from trl_ext.ppo.controllers import BandController, ProportionalController


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def sequence_kls(trainer):
    """The KL of each step in nats per sequence, by hand: per token, times the mean length of the rollout."""
    lines = [line for line in trainer.state.log_history if "kl" in line]
    return [line["kl"] * line["completions/mean_length"] for line in lines]


def test_grpos_beta_follows_the_band(tmp_path):
    trainer = trl_runs.grpo_trainer(tmp_path, max_steps=5)
    low, high = 1e-3, 2e-2
    trainer.add_callback(KLControlCallback(trainer, BandController(0.1, low, high)))
    betas = []
    compute = trainer._compute_loss

    def keep(*args):
        betas.append(trainer.beta)
        return compute(*args)

    trainer._compute_loss = keep
    trainer.train()
    expected, coef = [], 0.1
    for kl in sequence_kls(trainer):
        expected.append(coef)
        coef *= 0.5 if kl < low else 2.0 if kl > high else 1.0
    assert betas == pytest.approx(expected)  # what the loss was weighted with
    assert [line["coef/kl"] for line in trainer.state.log_history if "kl" in line] == pytest.approx(expected)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_proportional_control_counts_the_episodes_between_log_lines(tmp_path, logging_steps):
    trainer = trl_runs.grpo_trainer(tmp_path, max_steps=4, logging_steps=logging_steps)
    trainer.add_callback(KLControlCallback(trainer, ProportionalController(0.1, target=1.0, horizon=100)))
    trainer.train()
    coef = 0.1
    for kl in sequence_kls(trainer):
        coef *= 1 + min(max(kl / 1.0 - 1, -0.2), 0.2) * 4 * logging_steps / 100  # 4 completions a step
    assert trainer.beta == pytest.approx(coef)


def test_resumed_run_takes_up_the_coefficient(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first = trl_runs.grpo_trainer(tmp_path, **saving)
    first.add_callback(KLControlCallback(first, BandController(0.1, 10.0, 20.0)))  # every KL is below
    first.train()
    second = trl_runs.grpo_trainer(tmp_path, **(saving | {"max_steps": 3}))
    second.add_callback(KLControlCallback(second, BandController(0.1, 10.0, 20.0)))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [line["coef/kl"] for line in second.state.log_history if "kl" in line]
    assert logged[:2] == pytest.approx([0.1, 0.05])
    assert logged[2] <= 0.05


def test_run_stops_after_as_many_large_kls_as_said(tmp_path, capsys):
    trainer = trl_runs.grpo_trainer(tmp_path, learning_rate=0.1, max_steps=30, beta=1e-6)
    trainer.add_callback(KLControlCallback(stop_above=1e-3, patience=3))
    trainer.train()
    above = [kl > 1e-3 for kl in sequence_kls(trainer)]
    assert above[-3:] == [True] * 3
    assert [True] * 3 not in [above[i : i + 3] for i in range(len(above) - 3)]
    assert "for 3 log lines" in capsys.readouterr().out


def test_stop_is_for_ppo_too(tmp_path):
    trainer = ppo_runs.ppo_trainer(tmp_path, learning_rate=0.1, total_episodes=200, num_ppo_epochs=1, kl_coef=1e-6)
    trainer.add_callback(KLControlCallback(stop_above=1e-3, patience=2))
    trainer.train()
    assert trainer.state.global_step < 50
    assert min(ppo_runs.logged(trainer, "kl/ref")[-2:]) > 1e-3


def test_trainers_that_cannot_be_steered_are_refused(tmp_path):
    controller = BandController(0.1)
    with pytest.raises(ValueError, match="kl_controller"):
        KLControlCallback(ppo_runs.ppo_trainer(tmp_path / "ppo"), controller)
    with pytest.raises(ValueError, match="DPOTrainer"):
        KLControlCallback(trl_runs.dpo_trainer(tmp_path / "dpo"), controller)
    with pytest.raises(ValueError, match="`beta` is 0"):
        KLControlCallback(trl_runs.grpo_trainer(tmp_path / "grpo", beta=0.0), controller)
    with pytest.raises(ValueError, match="NoneType"):
        KLControlCallback(controller=controller)


@pytest.mark.parametrize(
    "wrong, match",
    [({}, "Nothing to do"), ({"stop_above": -1.0}, "above 0"), ({"stop_above": 1.0, "patience": 0}, "at least one")],
)
def test_options_that_mean_nothing_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        KLControlCallback(**wrong)
