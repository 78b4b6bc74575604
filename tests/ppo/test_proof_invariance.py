"""Loss and gradient do not depend on how a batch is cut; steps are taken, or left out, as the options say.

Compared is every gradient, logged number and final parameter of runs on the same responses (`layouts.py`), whose
lengths differ so much that a mean per micro-batch would be another loss.
"""

import itertools
import math

import pytest
import torch
from transformers import TrainerCallback

import layouts
import ppo_runs
from measurements import difference
from trl_ext import PPOTrainerX
from trl_ext.ppo import run_state
from trl_ext.ppo import trainer as trainer_module


pytestmark = pytest.mark.integration


TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _no_warning_of_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


# Micro-batches


@pytest.mark.parametrize("case, num_mini_batches", [("loss", 1), ("loss-full-head", 2), ("reward-scaled", 2)])
def test_micro_batches_change_nothing(case, num_mini_batches):
    options = layouts.CASES[case] | {"num_mini_batches": num_mini_batches}
    whole = layouts.run(8, 1, **options)
    assert len(whole["gradients"]) == 4 * num_mini_batches
    assert difference(layouts.run(4, 2, **options), whole) < TOLERANCE
    assert difference(layouts.run(1, 8, **options), whole) < TOLERANCE


def test_control_a_mean_per_micro_batch_depends_on_them():
    with layouts.mean_per_micro_batch():
        assert (
            difference(layouts.run(1, 8, **layouts.CASES["loss"]), layouts.run(8, 1, **layouts.CASES["loss"])) > 1e-2
        )


# Processes


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")  # accelerate and DeepSpeed import half of their optional dependencies
def test_two_processes_change_nothing(of_two_processes):
    """The same run on one process and on two, of one and of four micro-batches each; the mistakes do show."""
    measured = of_two_processes["ppo"]
    alone = {case: layouts.run(8, 1, **options) for case, options in layouts.CASES.items()}
    differences = {name: difference(result, alone.get(name, alone["loss"])) for name, result in measured.items()}
    mistaken = {name: differences.pop(name) for name in layouts.MISTAKES}
    assert differences.keys() == {*layouts.CASES, "1 x 4", "budgets", "exchange in every pass"}
    assert max(differences.values()) < TOLERANCE, differences
    assert min(mistaken.values()) > 1e-2, mistaken


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_exchanged_once_per_optimizer_step(of_two_processes):
    for case in ("1 x 4", "budgets"):
        run = of_two_processes["ppo"][case]
        assert run["exchanges"] == run["steps"] == 4, case
        assert run["passes"] >= 8, case
    mistaken = of_two_processes["ppo"]["exchange in every pass"]
    assert mistaken["exchanges"] == mistaken["passes"]


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shards", layouts.SHARDS)
def test_stream_of_held_out_prompts_counts_every_prompt_once(of_two_processes, shards):
    """Ten answers in batches of four: accelerate fills up the last with the first ones again."""
    alone = layouts.held_out(10, 1)
    assert len(alone) > 6
    assert of_two_processes["held out"][f"{shards} shards"] == pytest.approx(alone, rel=1e-5, abs=1e-5)


# Steps, as the options say


class KeepParameters(TrainerCallback):
    """The parameters before training and after every optimizer step."""

    def __init__(self):
        self.after = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after.append(ppo_runs.snapshot(model))

    on_step_end = on_train_begin

    def moved(self, step, of_critic):
        """Names of the parameters of actor or critic that are not bitwise what they were before the step."""
        before, after = self.after[step], self.after[step + 1]
        names = [name for name in after if name.startswith("critic.") == of_critic]
        return {name for name in names if not torch.equal(before[name], after[name])}


def kept_run(tmp_path, trainer_class=PPOTrainerX, **options):
    keep = KeepParameters()
    trainer = ppo_runs.ppo_trainer(tmp_path, {"callbacks": [keep]}, **options)
    trainer.__class__ = trainer_class
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps == len(keep.after) - 1
    return trainer, keep


@pytest.mark.parametrize("epochs, mini_batches", [(3, 1), (1, 4), (3, 2)])
def test_rollout_is_learned_from_in_epochs_times_mini_batches_steps(tmp_path, monkeypatch, epochs, mini_batches):
    rollouts = []
    collect = PPOTrainerX._collect_rollout
    monkeypatch.setattr(PPOTrainerX, "_collect_rollout", lambda *a: rollouts.append(collect(*a)) or rollouts[-1])
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "total_episodes": 16}
    _, keep = kept_run(tmp_path, num_ppo_epochs=epochs, num_mini_batches=mini_batches, **sizes)
    assert len(rollouts) == 2
    assert len(keep.after) - 1 == 2 * epochs * mini_batches
    for step in range(2 * epochs * mini_batches):
        assert keep.moved(step, of_critic=False), f"optimizer step {step} moved nothing"


def test_mini_batches_are_redrawn_every_epoch(tmp_path, monkeypatch):
    """Each epoch shows every sequence once, in other mini-batches, whose tokens a micro-batch knows."""
    drawn = []
    draw = trainer_module.draw_micro_batches

    def spy(*args, **kwargs):
        drawn.append(draw(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(trainer_module, "draw_micro_batches", spy)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "total_episodes": 16}
    models = {"rollout_func": layouts.answer, "train_dataset": layouts.PROMPTS}
    ppo_runs.ppo_run(tmp_path, models, num_ppo_epochs=4, num_mini_batches=2, response_length=9, **sizes)
    first_mini_batches = set()
    for epoch in drawn:
        epoch = list(itertools.chain.from_iterable(epoch))
        rows = [part.rows.tolist() for part in epoch]
        assert [len(part) for part in rows] == [2, 2, 2, 2]
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(8))
        first_mini_batches.add(frozenset(rows[0] + rows[1]))
        for i, part in enumerate(epoch):
            of_mini_batch = rows[i // 2 * 2] + rows[i // 2 * 2 + 1]
            assert part.num_tokens == part.rollout.mask[of_mini_batch].sum()
    assert len(drawn) == 2 * 4
    assert len(first_mini_batches) > 4


# Critic warm-up


@pytest.mark.parametrize("critic, kl_placement", [("model", "loss"), ("head", "reward")])
def test_warmup_leaves_the_actor_bitwise_for_exactly_its_steps(tmp_path, critic, kl_placement):
    """Three steps: the warm-up ends inside the second rollout. Weight decay would move even a gradient of zero."""
    _, keep = kept_run(
        tmp_path, critic=critic, kl_placement=kl_placement, critic_warmup_steps=3, weight_decay=0.1, total_episodes=12
    )
    for step in range(6):
        assert bool(keep.moved(step, of_critic=False)) == (step >= 3), f"optimizer step {step}"
        assert keep.moved(step, of_critic=True)
    # The trunk is the actor's, with a value head on it too.
    assert "model.layers.0.mlp.up_proj.weight" in keep.moved(3, of_critic=False)


# Explained variance that each of four rollouts of two steps measures
EXPLAINED = (0.2, math.nan, 0.7, 0.1)


@pytest.fixture
def explained(monkeypatch):
    measured, estimate = iter(EXPLAINED), trainer_module.estimate_returns
    monkeypatch.setattr(
        trainer_module,
        "estimate_returns",
        lambda *given: (estimate(*given)[0], {"value/explained_variance_mc": next(measured)}),
    )


@pytest.mark.parametrize("steps, until, first", [(0, 0.5, 4), (0, 0.7, 4), (3, 0.5, 4), (5, 0.5, 5), (0, 0.1, 0)])
def test_warmup_ends_when_the_critic_explains_enough_and_its_steps_are_over(tmp_path, explained, steps, until, first):
    options = {"critic_warmup_steps": steps, "critic_warmup_until": until, "total_episodes": 16, "weight_decay": 0.1}
    trainer, keep = kept_run(tmp_path, **options)
    assert [bool(keep.moved(step, of_critic=False)) for step in range(8)] == [step >= first for step in range(8)]
    assert all(keep.moved(step, of_critic=True) for step in range(8))
    assert ppo_runs.logged(trainer, "value/warmup") == [float(step < first) for step in (0, 2, 4, 6)]


def test_control_a_warmup_that_forgets_what_was_reached_goes_on(tmp_path, explained, monkeypatch):
    def saw(self, explained):
        self.reached = explained >= self.until

    monkeypatch.setattr(run_state.CriticWarmup, "saw", saw)
    _, keep = kept_run(tmp_path, critic_warmup_until=0.5, total_episodes=16)
    assert [bool(keep.moved(step, of_critic=False)) for step in (4, 6)] == [True, False]


def test_warmup_that_never_ends_is_said(tmp_path, explained, caplog):
    kept_run(tmp_path, critic_warmup_until=0.9, total_episodes=16)
    assert "Only the critic has learned" in caplog.text


def test_control_a_zero_gradient_in_the_warmup_moves_the_actor(tmp_path, monkeypatch):
    def zero(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(PPOTrainerX, "_drop_actor_gradients", zero)
    _, keep = kept_run(tmp_path, critic_warmup_steps=2, weight_decay=0.1)
    assert keep.moved(0, of_critic=False)


# Early stop


STOPPING = {"target_kl": 1e-6, "num_ppo_epochs": 4, "weight_decay": 0.1, "learning_rate": 1e-2}


@pytest.mark.parametrize("critic, num_mini_batches", [("model", 1), ("head", 2)])
def test_target_kl_leaves_every_parameter_bitwise_while_steps_count(tmp_path, critic, num_mini_batches):
    """The first step has KL 0; the second sees how far that went, and is the last to learn; so in both rollouts."""
    trainer, keep = kept_run(tmp_path, critic=critic, num_mini_batches=num_mini_batches, **STOPPING)
    per_rollout = 4 * num_mini_batches
    assert trainer.state.global_step == 2 * per_rollout
    for step in range(2 * per_rollout):
        learned = step % per_rollout < 2
        assert bool(keep.moved(step, of_critic=False)) == learned, f"optimizer step {step}"
        assert bool(keep.moved(step, of_critic=True)) == learned, f"optimizer step {step}"
    left_out = [line["policy/steps_left_out"] for line in trainer.state.log_history if "policy/steps_left_out" in line]
    assert sum(left_out) == 2 * (per_rollout - 2)


class ZeroGradients(PPOTrainerX):
    """The mistake: a step that is left out has gradients of 0 instead of none."""

    def training_step(self, *args, **kwargs):
        left_out = self.run_state.early_stop.stopped and self.is_amid_rollout
        loss = super().training_step(*args, **kwargs)
        if left_out:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        return loss


def test_control_a_zero_gradient_moves_the_parameters_in_a_step_left_out(tmp_path):
    _, keep = kept_run(tmp_path, ZeroGradients, **STOPPING)
    assert keep.moved(2, of_critic=False)


def test_target_kl_that_is_not_reached_leaves_nothing_out(tmp_path):
    trainer, keep = kept_run(tmp_path, **(STOPPING | {"target_kl": 1e3}))
    assert all(keep.moved(step, of_critic=False) for step in range(8))
    assert all(line["policy/steps_left_out"] == 0 for line in ppo_runs.log_lines(trainer))
