"""A step without a token that counts changes nothing, and the log has no number that was not measured."""

import itertools
import math

import pytest
import torch
from transformers import TrainerCallback

import tiny
from fake_vllm import vllm
from ppo_runs import logged, ppo_run, ppo_trainer, response_lengths, snapshot


pytestmark = pytest.mark.integration


def scored_but(rows, rollouts=(1,)):
    """Return a reward function that gives `None` for `rows` in these rollouts."""
    calls = []

    def score(completions, **kwargs):
        calls.append(None)
        silent = rows if len(calls) - 1 in rollouts else ()
        return [None if row in silent else float(len(text)) for row, text in enumerate(completions)]

    return score


class Watch(TrainerCallback):
    """Weights and the optimizer's state after each step, and the tokens that counted in it, from the masks."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.states, self.num_tokens = [self.now()], []
        trainer.add_callback(self)

    def now(self):
        optimizer = self.trainer.optimizer
        moments = {} if optimizer is None else optimizer.state_dict()["state"]
        kept = {
            f"{i}.{name}": torch.as_tensor(value).clone() for i, of in moments.items() for name, value in of.items()
        }
        return snapshot(self.trainer.model) | kept

    def on_step_end(self, args, state, control, **kwargs):
        per_step = args.gradient_accumulation_steps
        done = (self.trainer._step - 1) % args.steps_per_generation // per_step
        steps = self.trainer.run_state.micro_batches[done * per_step : (done + 1) * per_step]
        part = itertools.chain.from_iterable(steps)
        self.num_tokens.append(sum(self.trainer.run_state.rollout.mask[m.rows].sum().item() for m in part))
        self.states.append(self.now())

    def moved(self, step):
        before, after = self.states[step], self.states[step + 1]
        return before.keys() != after.keys() or any(not torch.equal(before[name], after[name]) for name in after)


def watched_run(folder, models=None, reward=None, **options):
    silent = {"reward_model": None, "reward_funcs": reward or scored_but(range(4))}
    trainer = ppo_trainer(folder, silent | (models or {}), total_episodes=12, weight_decay=0.1, **options)
    watch = Watch(trainer)
    trainer.train()
    return trainer, watch


CASES = {
    "critic of its own": {},
    "value head": {"critic": "head"},
    "KL in the reward": {"kl_placement": "reward", "normalize_rewards": True, "whiten_rewards": True},
    "mixture": {"models": {"model": tiny.tiny_mixture()}},
    "warm-up of the critic": {"critic_warmup_steps": 4},
    "some mini-batches": {"reward": scored_but([0, 1, 2], (0, 1, 2)), "num_mini_batches": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_step_without_tokens_moves_no_weight_and_no_moment(tmp_path, case):
    trainer, watch = watched_run(tmp_path, **CASES[case])
    counted = [tokens > 0 for tokens in watch.num_tokens]
    assert any(counted)
    assert not all(counted)
    assert [watch.moved(step) for step in range(len(counted))] == counted
    assert sum(logged(trainer, "policy/steps_left_out")) == counted.count(False)


def test_truncated_responses_that_are_masked_move_nothing(tmp_path):
    options = {"mask_truncated_completions": True, "response_length": 1, "temperature": 0.5}
    _, watch = watched_run(tmp_path, {"model": tiny.tiny_actor(5)}, scored_but([]), **options)
    counted = [tokens > 0 for tokens in watch.num_tokens]
    assert False in counted
    assert [watch.moved(step) for step in range(6)] == counted


@pytest.mark.parametrize(
    "options, reward, expected",
    [
        ({}, scored_but(range(4)), [1, 1, 0, 0, 1, 1]),
        ({"target_kl": 1e-9, "num_ppo_epochs": 3}, response_lengths, [1, 1, 0] * 3),
    ],
    ids=["no tokens", "early stop"],
)
def test_step_that_is_left_out_under_loss_scaling(tmp_path, options, reward, expected):
    """A gradient scaler needs gradients at each step. On a CPU fp16 has no scaler, so one is put in by hand."""
    models = {"reward_model": None, "reward_funcs": reward}
    trainer = ppo_trainer(tmp_path, models, total_episodes=12, **options)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    trainer.accelerator.native_amp = trainer.args.fp16 = True
    trainer.accelerator.state._mixed_precision = "fp16"
    watch = Watch(trainer)
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"
    assert [watch.moved(step) for step in range(len(expected))] == [bool(moved) for moved in expected]


# What a line says of it

OF_A_ROLLOUT = {
    "reward/score",
    "reward/total",
    "advantage/mean",
    "advantage/std",
    "value/explained_variance",
    "value/explained_variance_mc",
    "kl/ref",
}


def test_log_line_of_a_rollout_without_scores_has_no_metrics_of_it(tmp_path):
    trainer, _ = watched_run(tmp_path)
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    first, silent = lines[0], lines[2]
    assert silent["step"] == 3
    assert OF_A_ROLLOUT | {"loss", "grad_norm", "rewards/score/mean"} <= first.keys()
    gone = first.keys() - silent.keys()
    assert OF_A_ROLLOUT | {"loss", "grad_norm", "rewards/score/mean", "policy/ratio_mean"} <= gone
    assert not any(name.startswith(("terms/", "coef/", "policy/ratio", "value/")) for name in silent)
    assert all(value is not None and math.isfinite(value) for line in lines for value in line.values())


def test_samples_without_scores_are_printed_without_numbers(tmp_path, capsys):
    models = {"eval_dataset": tiny.tiny_prompts(4, seed=3)}
    trainer, _ = watched_run(tmp_path, models, scored_but(range(4), range(9)), log_completions=True)
    tables = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert any("none" in line for line in tables)
    assert not any("0.00" in line for line in tables)
    assert all(math.isnan(advantage) for advantage in trainer._logs["advantages"])


ENDED = [f"completions/{which}_terminated_length" for which in ("mean", "min", "max")]


def test_lengths_of_ended_responses_are_logged_only_if_one_has_ended(tmp_path):
    model = tiny.tiny_actor(5)
    model.generation_config.eos_token_id = [2, 30, 40]
    trainer = ppo_run(tmp_path, {"model": model}, response_length=3, total_episodes=32, num_ppo_epochs=1)
    lines = [line for line in trainer.state.log_history if "completions/clipped_ratio" in line]
    any_ended = [line["completions/clipped_ratio"] < 1 for line in lines]
    assert any(any_ended)
    assert not all(any_ended)
    assert [set(ENDED) <= line.keys() for line in lines] == any_ended
    assert [not set(ENDED) & line.keys() for line in lines] == [not ended for ended in any_ended]
    assert all(1 <= line[name] <= 3 for line in lines for name in ENDED if name in line)


def test_difference_to_vllm_is_logged_only_if_vllm_gave_probabilities(tmp_path):
    with vllm(unavailable=1):
        nothing = ppo_run(tmp_path / "nothing", use_vllm=True)
    assert not any(name.startswith("sampling/") for line in nothing.state.log_history for name in line)
    with vllm(unavailable=2):
        half = ppo_run(tmp_path / "half", use_vllm=True)
    assert len(logged(half, "sampling/sampling_logp_difference/mean")) == 2
