"""What a run logs: the equation of every line, each value against an independent one, and docs/metrics.md."""

import math
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

import oracles
import tiny
from plain import chosen, plain_distribution
from ppo_runs import log_lines, logged, ppo_run, ppo_trainer, response_lengths, sequences, sum_of_terms


def thousand(completions, **kwargs):
    return [1e3] * len(completions)


# --- the equation

VARIANTS = {
    "default": {},
    "window of three steps, moving coefficients": {
        "logging_steps": 3,
        "total_episodes": 24,
        "learning_rate": 1e-2,
        "kl_controller": "band",
        "kl_band": [1e-6, 1e-5],
        "old_kl_coef": 0.5,
        "old_kl_target": 1e-7,
        "kl_coef": 0.3,
    },
    "proportional": {"kl_controller": "proportional", "kl_target": 0.1, "kl_horizon": 10, "learning_rate": 1e-2},
    "exact KL": {"kl_estimator": "full", "learning_rate": 1e-2},
    "k3": {"kl_estimator": "k3", "learning_rate": 1e-2},
    "KL in the reward": {"kl_placement": "reward", "learning_rate": 1e-2},
    "steps and clipping of the critic's own, masked objective, good responses, λ by length": {
        "critic_steps": 2,
        "critic_max_grad_norm": 0.01,
        "policy_objective": "mask",
        "cliprange": 0.02,
        "positive_nll_coef": 0.3,
        "positive_min_score": 0.1,
        "lam_alpha": 0.5,
        "learning_rate": 1e-2,
        "logging_steps": 3,
    },
    "dual clip and clip-higher, gate, λ of the critic's own": {
        "cliprange": 0.02,
        "cliprange_high": 0.04,
        "dual_clip": 1.05,
        "critic_gate": True,
        "critic_lam": 1.0,
        "learning_rate": 1e-2,
    },
    "value head outside the trunk, mini-batches": {
        "critic": "head",
        "critic_stop_gradient": True,
        "critic_steps": 3,
        "num_mini_batches": 2,
    },
    "warm-up": {"critic_warmup_steps": 2, "learning_rate": 1e-2},
    "early stop": {"target_kl": 1e-4, "num_ppo_epochs": 4, "learning_rate": 1e-2, "logging_steps": 3},
    "no KL, no value clipping": {"kl_coef": 0.0, "cliprange_value": None, "vf_coef": 2.0, "ent_coef": 0.0},
    "large scores": {"models": lambda: {"reward_model": None, "reward_funcs": thousand}},
    "experts, good responses": {
        "models": lambda: {"model": tiny.tiny_mixture()},
        "positive_nll_coef": 0.3,
        "positive_min_score": 0.0,
    },
}


def run_with_losses(tmp_path, variant):
    """A run, and the loss that the optimizer saw in each step."""
    options = dict(VARIANTS[variant])
    trainer = ppo_trainer(tmp_path, options.pop("models", dict)(), **options)
    losses = {}
    compute = trainer._compute_loss

    def keep(model, inputs):
        loss = compute(model, inputs)
        if not inputs.critic_alone:
            step = trainer.state.global_step
            losses[step] = losses.get(step, 0.0) + loss.item()
        return loss

    trainer._compute_loss = keep
    trainer.train()
    return trainer, losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_line_holds_and_its_loss_is_the_one_that_was_optimised(tmp_path, variant):
    trainer, losses = run_with_losses(tmp_path, variant)
    lines, first = log_lines(trainer), 0
    assert lines
    for line in lines:
        in_window = [losses[step] for step in range(first, line["step"]) if step in losses]
        first = line["step"]
        mean = sum(in_window) / len(in_window)
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)
        # The optimizer's own number is float32.
        assert line["loss"] == pytest.approx(mean, abs=1e-5, rel=1e-6)


def test_control_a_line_with_a_missing_term_does_not_hold(tmp_path):
    trainer, _ = run_with_losses(tmp_path, "experts, good responses")
    for line in log_lines(trainer):
        for term in ("aux", "positive_nll"):
            assert abs(sum_of_terms(line | {f"coef/{term}": 0.0}) - line["loss"]) > 1e-2
        assert abs(sum_of_terms(line | {"coef/entropy": -line["coef/entropy"]}) - line["loss"]) > 1e-2


def test_window_holds_means_over_its_steps_and_weighted_coefficients(tmp_path):
    moving = VARIANTS["window of three steps, moving coefficients"]
    each = log_lines(ppo_run(tmp_path / "each", **(moving | {"logging_steps": 1})))
    windows = log_lines(ppo_run(tmp_path / "windows", **moving))
    assert len({line["coef/kl"] for line in each}) > 1
    assert len({line["coef/old_kl"] for line in each}) > 1
    for k, window in enumerate(windows):
        steps = each[3 * k : 3 * k + 3]
        for key in window:
            values = [step[key] for step in steps if key in step]
            if key == "loss" or key.startswith("terms/") or key in ("policy/ratio_mean", "policy/clip_fraction"):
                assert window[key] == pytest.approx(sum(values) / 3, rel=1e-4, abs=1e-7)
        assert window["policy/ratio_max"] == pytest.approx(max(step["policy/ratio_max"] for step in steps), rel=1e-4)
        for coefficient, term in {"kl": "kl", "old_kl": "old_kl", "vf": "value_loss", "entropy": "entropy"}.items():
            weighted = sum(step[f"coef/{coefficient}"] * step[f"terms/{term}"] for step in steps)
            total = sum(step[f"terms/{term}"] for step in steps)
            assert window[f"coef/{coefficient}"] == pytest.approx(weighted / total, rel=1e-3)


def test_window_counts_the_steps_that_an_early_stop_has_left(tmp_path):
    options = {"target_kl": 1e-4, "num_ppo_epochs": 4, "learning_rate": 1e-2}
    each = log_lines(ppo_run(tmp_path / "each", **options))
    trainer = ppo_run(tmp_path / "windows", **options, logging_steps=4)
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    taken = [[line for line in each if 4 * k < line["step"] <= 4 * k + 4] for k in range(2)]
    for line, steps in zip(lines, taken, strict=True):
        assert len(steps) < 4
        assert line["policy/steps_left_out"] == 4 - len(steps)
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps), rel=1e-5)


def test_router_loss_is_one_more_term(tmp_path):
    lines = log_lines(ppo_run(tmp_path, {"model": tiny.tiny_mixture()}))
    assert all(line["terms/aux_loss"] > 0 and line["coef/aux"] == 0.1 for line in lines)
    # It is asked for while learning, whatever the config says, and can be switched off.
    lines = log_lines(ppo_run(tmp_path, {"model": tiny.tiny_mixture(output_router_logits=False)}, max_steps=1))
    assert "terms/aux_loss" in lines[0]
    lines = log_lines(ppo_run(tmp_path, {"model": tiny.tiny_mixture()}, max_steps=1, router_aux_loss_coef=0.0))
    assert "terms/aux_loss" not in lines[0]


def test_coefficients_change_between_rollouts_only(tmp_path):
    """The band doubles a coefficient above it: once per rollout, whatever the number of steps."""
    options = {"kl_controller": "band", "kl_band": [1e-9, 1e-8], "kl_coef": 0.01, "learning_rate": 1e-2}
    models = {"ref_model": tiny.tiny_actor(5)}
    trainer = ppo_run(tmp_path, models, total_episodes=12, num_ppo_epochs=2, num_mini_batches=2, **options)
    assert logged(trainer, "coef/kl") == pytest.approx([0.01] * 4 + [0.02] * 4 + [0.04] * 4)


# --- the last line


class StopAtFour(TrainerCallback):
    """As `EarlyStoppingCallback` does, after an evaluation."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4


@pytest.mark.parametrize("ended_by", ["max_steps", "an evaluation of the last step", "a callback"])
def test_steps_after_the_last_full_window_are_logged_once(tmp_path, ended_by):
    models, options = {}, {"num_sample_generations": 0, "lr_scheduler_type": "constant"}
    if ended_by != "max_steps":
        models["eval_dataset"] = tiny.tiny_prompts(2, seed=3)
        options |= {"eval_strategy": "steps", "eval_steps": 4}
    if ended_by == "a callback":
        models["callbacks"] = [StopAtFour()]
        options["total_episodes"] = 16
    each = {line["step"]: line for line in log_lines(ppo_run(tmp_path / "each", lr_scheduler_type="constant"))}
    log = ppo_run(tmp_path, models, logging_steps=3, **options).state.log_history
    lines = [line for line in log if "loss" in line]
    assert [line["step"] for line in lines] == [3, 4]
    assert {line["step"] for line in log} == {3, 4}
    for key in ("loss", "terms/clip_objective", "terms/value_loss", "terms/entropy", "policy/ratio_max", "grad_norm"):
        assert lines[-1][key] == pytest.approx(each[4][key], rel=1e-5), key
    assert lines[-1]["loss"] == pytest.approx(sum_of_terms(lines[-1]), rel=1e-5)
    assert "train_runtime" in log[-1]
    assert not log[-1].keys() & lines[-1].keys() - {"step", "epoch"}


def test_logging_can_be_switched_off(tmp_path):
    log = ppo_run(tmp_path, logging_strategy="no").state.log_history
    assert [line["step"] for line in log if "loss" in line] == []


# --- every value against an independent one


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """One rollout, two steps with a learning rate that leaves the clip ranges; actor and critic at both steps."""
    models = {"model": tiny.tiny_actor(), "ref_model": tiny.tiny_actor(5), "value_model": tiny.tiny_reward_model(7)}
    states = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    trainer = ppo_run(
        tmp_path_factory.mktemp("measured"),
        models | {"callbacks": [Keep()]},
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        total_episodes=8,
        response_length=20,
        learning_rate=2e-2,
        whiten_advantages=False,
        gamma=0.9,
        kl_coef=0.3,
        cliprange=0.1,
        cliprange_value=0.05,
        temperature=0.8,
        max_grad_norm=0.0,
    )
    actors = [tiny.tiny_actor() for _ in range(2)]
    critics = [tiny.tiny_reward_model(7) for _ in range(2)]
    actors[1].load_state_dict({n: t for n, t in states[0].items() if not n.startswith("critic.")})
    of_critic = {n.removeprefix("critic.model."): t for n, t in states[0].items() if n.startswith("critic.")}
    critics[1].load_state_dict(of_critic)
    return SimpleNamespace(
        trainer=trainer, rollout=trainer.run_state.rollout, lines=log_lines(trainer), actors=actors, critics=critics
    )


@torch.no_grad()
def read(model, rollout):
    """Log-probabilities and entropies, or values, of each sequence's tokens, from plain passes without padding."""
    result = SimpleNamespace(logps=[], entropy=[], values=[])
    for prompt, response in sequences(rollout):
        if hasattr(model, "score"):
            states = model.model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 : -1]
            result.values.append(model.score(states)[:, 0].tolist())
        else:
            distribution = plain_distribution(model, prompt, response, temperature=0.8)
            result.logps.append(chosen(distribution, response).tolist())
            result.entropy.append((-(distribution.exp() * distribution).sum(-1)).tolist())
    return result


def flat(nested):
    return [x for row in nested for x in row]


def mean(numbers):
    return sum(numbers) / len(numbers)


@pytest.fixture(scope="module")
def expected(measured):
    """Everything from plain models and the slow loops of `oracles`, sequence by sequence."""
    rollout = measured.rollout
    old, new = (read(actor, rollout) for actor in measured.actors)
    reference = read(tiny.tiny_actor(5), rollout)
    old_values, new_values = (read(critic, rollout).values for critic in measured.critics)
    scores = rollout.scores.tolist()
    advantages, returns, to_go = [], [], []
    for score, values in zip(scores, old_values, strict=True):
        rewards = [0.0] * (len(values) - 1) + [score]
        advantages.append(oracles.gae(rewards, values, gamma=0.9, lam=0.95))
        to_go += oracles.rewards_to_go(rewards, 0.9)
        returns.append([a + v for a, v in zip(advantages[-1], values, strict=True)])
    return SimpleNamespace(
        old=old,
        new=new,
        reference=reference,
        scores=scores,
        advantages=flat(advantages),
        returns=flat(returns),
        to_go=to_go,
        old_values=flat(old_values),
        new_values=flat(new_values),
        ratios=[math.exp(a - b) for a, b in zip(flat(new.logps), flat(old.logps), strict=True)],
    )


def close(value):
    return pytest.approx(value, rel=2e-4, abs=2e-6)


def test_rollout_values_are_measured_on_real_tokens(measured, expected):
    line = measured.lines[0]
    per_sequence = [
        sum(a - b for a, b in zip(mine, its, strict=True))
        for mine, its in zip(expected.old.logps, expected.reference.logps, strict=True)
    ]
    _, average, variance = oracles.moments(expected.advantages)
    assert line["kl/ref"] == close(mean(per_sequence))
    assert line["reward/score"] == close(mean(expected.scores))
    assert line["reward/total"] == close(mean(expected.scores))
    assert line["advantage/mean"] == close(average)
    assert line["advantage/std"] == close(variance**0.5)
    assert line["value/explained_variance"] == close(oracles.explained_variance(expected.old_values, expected.returns))
    to_go = oracles.explained_variance(expected.old_values, expected.to_go)
    assert line["value/explained_variance_mc"] == close(to_go)


def test_first_step_is_on_policy(measured, expected):
    line = measured.lines[0]
    differences = [a - b for a, b in zip(flat(expected.old.logps), flat(expected.reference.logps), strict=True)]
    assert line["terms/clip_objective"] == close(mean(expected.advantages))
    assert line["terms/kl"] == close(mean([0.5 * d * d for d in differences]))
    assert line["terms/entropy"] == close(mean(flat(expected.old.entropy)))
    errors = [0.5 * (v - r) ** 2 for v, r in zip(expected.old_values, expected.returns, strict=True)]
    assert line["terms/value_loss"] == close(mean(errors))
    assert line["terms/old_kl"] == line["policy/clip_fraction"] == line["value/clip_fraction"] == 0
    assert line["policy/ratio_mean"] == line["policy/ratio_max"] == 1


def test_second_step_is_measured_against_the_policy_that_sampled(measured, expected):
    line, ratios = measured.lines[1], expected.ratios
    pairs = list(zip(ratios, expected.advantages, strict=True))
    assert line["terms/clip_objective"] == close(mean([oracles.clip_objective(r, a, 0.1) for r, a in pairs]))
    assert line["terms/old_kl"] == close(mean([r - 1 - math.log(r) for r in ratios]))
    assert line["policy/approx_kl"] == line["terms/old_kl"]
    assert line["policy/ratio_mean"] == close(mean(ratios))
    assert line["policy/ratio_max"] == close(max(ratios))
    clipped = mean([oracles.is_clipped(r, a, 0.1) for r, a in pairs])
    assert 0.05 < clipped < 0.95
    assert line["policy/clip_fraction"] == close(clipped)
    assert line["terms/entropy"] == close(mean(flat(expected.new.entropy)))
    values = list(zip(expected.new_values, expected.old_values, expected.returns, strict=True))
    losses = [oracles.clipped_value_loss(v, old, target, 0.05) for v, old, target in values]
    assert line["terms/value_loss"] == close(mean(losses))
    where = [loss > (v - target) ** 2 / 2 for loss, (v, _, target) in zip(losses, values, strict=True)]
    assert 0.05 < mean(where) < 0.95
    assert line["value/clip_fraction"] == close(mean(where))


def test_total_reward_holds_the_kl_in_the_reward_and_the_loss_does_not(tmp_path):
    models = {"ref_model": tiny.tiny_actor(5)}
    trainer = ppo_run(tmp_path, models, kl_placement="reward", kl_coef=0.3, max_steps=1)
    (line,) = log_lines(trainer)
    assert line["kl/ref"] > 0.5
    assert line["reward/total"] == pytest.approx(line["reward/score"] - 0.3 * line["kl/ref"], rel=1e-5)
    assert "terms/kl" not in line
    assert line["coef/kl"] == 0.3


def test_completion_statistics_are_logged(measured):
    line, rollout = measured.lines[0], measured.rollout
    lengths = rollout.attended.sum(dim=1).tolist()
    ended = [length for length, has_eos in zip(lengths, rollout.has_eos.tolist(), strict=True) if has_eos]
    assert 0 < len(ended) < 8
    assert line["completions/mean_length"] == close(mean(lengths))
    assert (line["completions/min_length"], line["completions/max_length"]) == (min(lengths), max(lengths))
    assert line["completions/clipped_ratio"] == close(1 - len(ended) / 8)
    assert line["completions/mean_terminated_length"] == close(mean(ended))
    assert line["num_tokens"] == rollout.prompt_mask.sum() + sum(lengths)


# --- time


def test_speed_is_response_tokens_by_the_seconds_of_a_cycle(tmp_path):
    trainer = ppo_run(tmp_path)
    first, second = (line for line in log_lines(trainer) if "time/generate" in line)
    assert (first["step"], second["step"]) == (1, 3)
    assert not first.keys() & {"time/learn", "tokens_per_second"}  # nothing was learned before the first rollout
    seconds = second["time/generate"] + second["time/score"] + second["time/learn"]
    assert second["tokens_per_second"] * seconds == pytest.approx(
        trainer.run_state.rollout.attended.sum().item(), rel=1e-6
    )


def test_sample_completions_count_for_no_phase(tmp_path, monkeypatch):
    """A clock that ticks each time it is read; showing samples takes a thousand ticks."""
    clock = [0.0]

    def look():
        clock[0] += 1
        return clock[0]

    def show(sampling):
        clock[0] += 1000

    monkeypatch.setattr("trl_ext.runs.profiler.time", SimpleNamespace(perf_counter=look))
    trainer = ppo_trainer(tmp_path, {"eval_dataset": tiny.tiny_prompts(2, seed=3)}, total_episodes=12)
    trainer.generate_completions = show
    trainer.train()
    assert clock[0] > 3000
    times = [value for line in log_lines(trainer) for key, value in line.items() if key.startswith("time/")]
    assert len(times) == 8
    assert 0 < min(times) <= max(times) < 100


# --- the table of completions


def test_table_of_completions_shows_scores_and_mean_advantages(tmp_path):
    trainer = ppo_run(tmp_path, {"reward_funcs": [response_lengths]}, max_steps=1, log_completions=True)
    table = pd.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    rollout = trainer.run_state.rollout
    advantages = [a[m].mean().item() for a, m in zip(rollout.advantages, rollout.mask, strict=True)]
    assert table["advantage"].tolist() == pytest.approx(advantages, rel=1e-5)
    both = table["reward_model"] + table["response_lengths"]
    assert both.tolist() == pytest.approx(rollout.scores.tolist(), rel=1e-5)
