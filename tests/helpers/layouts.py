"""One PPO run on given responses, cut into micro-batches and processes as one likes, and what it measures."""

import itertools
import tempfile
from contextlib import nullcontext
from unittest import mock

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import dpo_runs
import ppo_runs
import tiny
from trl_ext import PPOTrainerX
from trl_ext.masked import identity
from trl_ext.ppo import trainer as trainer_module


PROMPTS = tiny.tiny_prompts(8)

# Answers to the prompts: lengths from 1 to 9, so that a mean per micro-batch is not the mean; 0 marks a tool's token.
ENV_MASKS = [[1] * 9, [1], [1, 1, 0, 0, 1], [1, 1], [0, 1, 1, 1, 1, 0, 1, 1], [1] * 3, [1] * 7, [1, 0]]

# Two rollouts, two epochs. Plain gradient descent: Adam would turn the rounding error of a small gradient into a step.
SETTINGS = {
    "total_episodes": 16,
    "num_ppo_epochs": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 1e6,
    "response_length": 9,
    "kl_coef": 0.2,
    "old_kl_coef": 0.1,
    "use_cpu": True,
    "num_sample_generations": 0,
}


def by_token(completion_ids, **kwargs):
    """A reward function that pays at every token, of a tool too, and not at all for a response of three."""
    return [None if len(ids) == 3 else [token % 7 / 4 - 0.5 for token in ids] for ids in completion_ids]


# What is measured on two processes, against one: the losses, and all that is computed over all ranks.
CASES = {
    "loss": {"kl_estimator": "k2", "positive_nll_coef": 0.3, "positive_min_score": 0.0},
    "loss-full-head": {
        "kl_estimator": "full",
        "critic": "head",
        "cliprange": 0.02,
        "cliprange_high": 0.04,
        "dual_clip": 1.05,
        "lam_alpha": 0.5,
    },
    "reward-scaled": {
        "critic_gate": True,
        "critic_lam": 0.5,
        "kl_placement": "reward",
        "normalize_rewards": True,
        "whiten_rewards": True,
        "reward_funcs": [by_token],
        "reward_weights": [1.0, 0.5],
    },
    "warmup-stop": {
        "critic": "head",
        "critic_stop_gradient": True,
        "critic_steps": 2,
        "critic_warmup_steps": 1,
        "target_kl": 1e-4,
        "num_ppo_epochs": 4,
        "kl_controller": "band",
    },
    "critic-steps": {
        "critic_steps": 2,
        "critic_learning_rate": 0.2,
        "critic_weight_decay": 0.1,
        "critic_lr_scheduler_type": "cosine",
        "critic_max_grad_norm": 0.1,
        "critic_warmup_until": 0.1,  # reached at the second rollout
        "freeze_critic": ["*self_attn*"],
        "policy_objective": "mask",
        "cliprange": 0.3,
        "cliprange_high": 0.6,
    },
}

BUDGETS = CASES["loss"] | {"micro_batch_tokens": 24, "score_batch_tokens": 32}
SHARDS = (1, 5)  # of a stream; so many are more than there are processes

# All log lines but times.
LOGGED = ("loss", "grad_norm", "terms/", "coef/", "policy/", "value/", "kl/", "reward/", "rewards/", "advantage/")


def answer(prompts, trainer):
    """Always the same answer to a prompt, whichever process is asked."""
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(7, 64, (len(mask),), generator=generator).tolist() for mask in ENV_MASKS]
    rows = [PROMPTS["prompt"].index(prompt) for prompt in prompts]
    return {
        "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [responses[row] for row in rows],
        "logprobs": None,
        "env_mask": [ENV_MASKS[row] for row in rows],
    }


def models_of(options):
    models = {"train_dataset": PROMPTS, "ref_model": tiny.tiny_actor(5), "value_model": tiny.tiny_reward_model(7)}
    if options.get("critic") == "head":
        del models["value_model"]
    return models | {"rollout_func": answer}


def run(size, accumulation, **options):
    """
    Gradients, log lines and final parameters of a run on the eight prompts, `size × accumulation` per process; and the
    numbers of its passes, of DDP's exchanges of gradients, and of its optimizer steps.
    """
    keep = dpo_runs.KeepGradients()
    models = models_of(options) | {"callbacks": [keep], "reward_funcs": options.pop("reward_funcs", None)}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_runs.ppo_trainer(folder, models, **(SETTINGS | sizes | options))
        if options.get("critic") == "head":  # 0 at the start; then the trunk would have no part in the value
            torch.manual_seed(0)
            nn.init.normal_(trainer.critic.score.weight, std=0.5)
        counts = counting(trainer)
        trainer.train()
    lines = [{key: line[key] for key in line if key.startswith(LOGGED)} for line in ppo_runs.log_lines(trainer)]
    measured = {"gradients": keep.steps, "lines": lines, "parameters": ppo_runs.snapshot(trainer.model)}
    return measured | counts | {"steps": trainer.state.global_step}


def counting(trainer):
    """Passes with a gradient, and exchanges of all gradients, counted while the trainer trains."""
    counts = {"passes": 0, "exchanges": 0}
    compute_loss = trainer._compute_loss

    def exchange(_, bucket):
        counts["exchanges"] += bucket.is_last()
        return allreduce_hook(None, bucket)

    def counted(model, inputs):
        if counts["passes"] == 0 and isinstance(model, nn.parallel.DistributedDataParallel):
            model.register_comm_hook(None, exchange)
        counts["passes"] += 1
        return compute_loss(model, inputs)

    trainer._compute_loss = counted
    return counts


def held_out(batch_size, shards):
    """What is logged of an evaluation on a stream of five prompts, two answers to each."""
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": batch_size, "use_cpu": True}
    stream = PROMPTS.select(range(5)).to_iterable_dataset(num_shards=shards)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ppo_runs.ppo_trainer(folder, models_of({}), response_length=9, **options)
        metrics = trainer.evaluate(stream)
    kept = ("eval_reward/", "eval_rewards/", "eval_kl/", "eval_completions/")
    return {key: value for key, value in metrics.items() if key.startswith(kept)}


# Mistakes that a comparison of layouts must notice


def mean_per_micro_batch():
    """Every micro-batch is divided by its own tokens, as in a mean of means."""
    draw = trainer_module.draw_micro_batches

    def draw_with_own_counts(rollout, *args, **kwargs):
        steps = draw(rollout, *args, **kwargs)
        for part in itertools.chain.from_iterable(steps):
            part.num_tokens = rollout.mask[part.rows].sum().item() / part.share
        return steps

    return mock.patch.object(trainer_module, "draw_micro_batches", draw_with_own_counts)


def moments_per_rank():
    """Whitening and reward moments see the samples of one rank."""
    estimate = trainer_module.estimate_returns
    return mock.patch.object(trainer_module, "estimate_returns", lambda *args: estimate(*args[:-1], identity))


def exchange_in_every_pass():
    """DDP exchanges gradients in every pass of an optimizer step, not only in its last."""
    return mock.patch.object(Accelerator, "no_sync", return_value=nullcontext())


def gradient_of_one_share():
    """The terms are shares of a sum over the ranks, and DDP averages: the factor between the two is forgotten."""
    compute_loss = PPOTrainerX._compute_loss
    return mock.patch.object(
        PPOTrainerX,
        "_compute_loss",
        lambda self, model, inputs: compute_loss(self, model, inputs) / self.accelerator.num_processes,
    )


MISTAKES = {
    "mean per micro-batch": mean_per_micro_batch,
    "moments per rank": moments_per_rank,
    "gradient of one share": gradient_of_one_share,
}


def measure():
    """In each of two processes: every case and every mistake."""
    measured = {name: run(4, 1, **options) for name, options in CASES.items()}
    measured["1 x 4"] = run(1, 4, **CASES["loss"])
    measured["budgets"] = run(4, 1, **BUDGETS)
    with exchange_in_every_pass():
        measured["exchange in every pass"] = run(4, 1, **BUDGETS)
    for name, mistake in MISTAKES.items():
        with mistake():
            measured[name] = run(2, 2, **CASES["loss"])
    return measured
