"""Short PPO runs on tiny models, for the tests of the trainer: 4 optimizer steps take about half a second."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import tiny
from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.ppo.rollout import Rollout


def ppo_config(output_dir: str | Path, **options: Any) -> PPOConfigX:
    """Rollouts of 4 prompts in micro-batches of 2, 2 epochs, 2 rollouts; `options` override."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if not options.keys() & {"total_episodes", "max_steps", "num_train_epochs"}:
        defaults["total_episodes"] = 8
    return PPOConfigX(**(defaults | options))


def ppo_trainer(output_dir: str | Path, models: dict[str, Any] | None = None, **options: Any) -> PPOTrainerX:
    """A trainer with a tiny actor, reward model, tokenizer and 16 prompts; `models`: arguments of the constructor."""
    arguments = {
        "processing_class": tiny.tiny_tokenizer(),
        "model": tiny.tiny_actor(),
        "reward_model": tiny.tiny_reward_model(),
        "train_dataset": tiny.tiny_prompts(16),
    }
    if options.get("use_vllm"):
        arguments["model"].name_or_path = "tiny"  # by which a colocated vLLM would load it
    return PPOTrainerX(ppo_config(output_dir, **options), **(arguments | (models or {})))


def ppo_run(output_dir: str | Path, models: dict[str, Any] | None = None, **options: Any) -> PPOTrainerX:
    """`ppo_trainer`, trained."""
    trainer = ppo_trainer(output_dir, models, **options)
    trainer.train()
    return trainer


def log_lines(trainer: PPOTrainerX) -> list[dict[str, float]]:
    """The log lines of optimizer steps."""
    return [line for line in trainer.state.log_history if "loss" in line]


def logged(trainer: PPOTrainerX, key: str) -> list[float]:
    """The values of `key`, in order."""
    return [line[key] for line in trainer.state.log_history if key in line]


def returned_by(trainer: PPOTrainerX, name: str) -> list[Any]:
    """A list that fills with what a method of this trainer returns."""
    method, results = getattr(trainer, name), []

    def keep(*args: Any, **kwargs: Any) -> Any:
        results.append(method(*args, **kwargs))
        return results[-1]

    setattr(trainer, name, keep)
    return results


def sequences(rollout: Rollout) -> list[tuple[list[int], list[int]]]:
    """The real token ids of each prompt and its response."""
    prompts = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    responses = zip(rollout.response_ids, rollout.attended, strict=True)
    return [
        (prompt[real].tolist(), response[attended].tolist())
        for (prompt, real), (response, attended) in zip(prompts, responses, strict=True)
    ]


def sum_of_terms(line: dict[str, float]) -> float:
    """The right side of the equation that every log line keeps."""
    return (
        -line["terms/clip_objective"]
        + line["coef/kl"] * line.get("terms/kl", 0.0)
        + line["coef/vf"] * line["terms/value_loss"]
        - line["coef/entropy"] * line["terms/entropy"]
        + line["coef/old_kl"] * line["terms/old_kl"]
        + line.get("coef/aux", 0.0) * line.get("terms/aux_loss", 0.0)
        + line.get("coef/positive_nll", 0.0) * line.get("terms/positive_nll", 0.0)
    )


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter, by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the parameters that differ from a snapshot."""
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def response_lengths(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward function: a tenth of the number of words."""
    return [len(completion.split()) / 10 for completion in completions]


def best_after_two_steps(completions: list[str], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward function whose scores are best, 0, after two optimizer steps."""
    return [-abs(trainer_state.global_step - 2.0)] * len(completions)


def run_to_best_checkpoint(
    output_dir: str | Path, models: dict[str, Any], **options: Any
) -> tuple[PPOTrainerX, dict[int, dict[str, torch.Tensor]]]:
    """
    A run of 6 steps that saves every two and ends with the checkpoint of the best held-out score, which `models` has
    to make that of step 2. Returns the trainer, and the parameters at each checkpoint.
    """
    every_two_steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    trainer = ppo_trainer(
        output_dir,
        models | {"eval_dataset": tiny.tiny_prompts(3, seed=3)},
        total_episodes=12,
        per_device_eval_batch_size=2,
        metric_for_best_model="eval_reward/score",
        load_best_model_at_end=True,
        num_sample_generations=0,
        learning_rate=1e-2,
        **every_two_steps,
        **options,
    )
    kept = {}
    save = trainer._save_checkpoint

    def keep(*args: Any, **kwargs: Any) -> None:
        kept[trainer.state.global_step] = snapshot(trainer.model)
        save(*args, **kwargs)

    trainer._save_checkpoint = keep
    trainer.train()
    assert list(kept) == [2, 4, 6]
    assert trainer.state.best_model_checkpoint == str(Path(output_dir) / "checkpoint-2")
    return trainer, kept
