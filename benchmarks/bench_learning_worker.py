"""
Runs of `bench_learning.py`, one after the other in one process: each line that it prints after `RESULT` is what a job
gave, as JSON.

It runs in each trainer's environment: `python bench_learning_worker.py JOBS.json`.
"""

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bench_learning_setup import (
    ASK,
    PAD,
    TASKS,
    Job,
    Task,
    held_out_score,
    load_start,
    play,
    tokenizer,
    training_prompts,
    words_of,
)
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed


class HeldOutCurve(TrainerCallback):
    """
    Measures the held-out score before the first rollout, and after every few.

    Args:
        model: the actor, which the trainer changes in place.
        steps, samples: what the trainer counts as steps between two measurements, and the answers that it samples.
    """

    def __init__(self, model: nn.Module, task: Task, steps: int, samples: int):
        self.model, self.task, self.steps, self.samples = model, task, steps, samples
        self.points = [(0, held_out_score(model, task))]
        self.seconds = 0.0  # of the measurements

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps == 0:
            start = time.perf_counter()
            self.points.append((len(self.points) * self.samples, held_out_score(self.model, self.task)))
            self.seconds += time.perf_counter() - start


class RuleReward(nn.Module):
    """A task's score in the form of a reward model, for TRL 1.12: its states are the score, at every token."""

    base_model_prefix = "rule"

    def __init__(self, task: Task):
        super().__init__()
        self.task, self.score = task, nn.Identity()

    def rule(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        scores = []
        for row in input_ids.tolist():
            words = [word for word in words_of(row) if word != PAD]
            end = words.index(ASK) + 1
            scores.append(self.task.score(words[:end], words[end:] or [PAD]))
        states = torch.tensor(scores)[:, None, None].expand(-1, input_ids.size(1), 1)
        return SimpleNamespace(hidden_states=[states])


def options(job: Job, folder: str) -> dict[str, Any]:
    """Return what all trainers are told, and this one alone; it steps twice in each pass over a rollout."""
    sizes = {"per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1, "output_dir": folder}
    rate = {"learning_rate": job["learning_rate"], "lr_scheduler_type": "constant", "seed": job["seed"]}
    machine = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    quiet = {"logging_steps": 10**6, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return sizes | rate | machine | quiet | {"temperature": 1.0} | job["options"]


def build(job: Job, starts: Path, folder: str) -> tuple[Any, HeldOutCurve]:
    """Return the trainer of a job, and the curve that it draws."""
    task, kind, size = TASKS[job["task"]], job["kind"], job["batch"]
    set_seed(job["seed"])
    actor = load_start(starts / job["start"])
    told = options(job, folder)
    epochs = told["num_iterations"] if kind == "grpo" else told["num_ppo_epochs"]
    per_rollout = 1 if kind == "trl-1.12" else 2 * epochs  # TRL 1.12 counts a rollout as a step
    between = job["samples"] // size // job["measurements"]
    curve = HeldOutCurve(actor, task, steps=per_rollout * between, samples=size * between)
    prompts = [" ".join(prompt) for prompt in training_prompts(task, job["samples"], job["seed"])]
    if kind == "trl-1.12":
        return baseline(told, job, prompts, actor, starts / job["start"], curve), curve
    given: dict[str, Any] = {"model": actor, "processing_class": tokenizer(), "callbacks": [curve]}
    given["train_dataset"] = Dataset.from_dict({"prompt": prompts, "question": prompts})
    given["reward_funcs"] = reward(task)
    if task.observe is not None:
        given["rollout_func"] = rollouts(actor, task)
    if kind == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        told |= {"per_device_train_batch_size": size // 2, "steps_per_generation": 2, "shuffle_dataset": False}
        told |= {"max_completion_length": task.limit, "max_steps": per_rollout * job["samples"] // size}
        return GRPOTrainer(args=GRPOConfig(**told), **given), curve
    from trl_ext import PPOConfigX, PPOTrainerX

    told |= {"total_episodes": job["samples"], "response_length": task.limit, "num_sample_generations": 0}
    return PPOTrainerX(PPOConfigX(**told, shuffle_dataset=False), **given), curve


def reward(task: Task) -> Callable:
    def score(completion_ids: Sequence[Sequence[int]], question: Sequence[str], **_: Any) -> list[float]:
        return [task.score(q.split(), words_of(ids)) for q, ids in zip(question, completion_ids, strict=True)]

    return score


def rollouts(actor: nn.Module, task: Task) -> Callable:
    """Return the `rollout_func` of a task with a tool."""
    return lambda prompts, trainer: play(actor, task, [prompt.split() for prompt in prompts])


def baseline(
    told: dict[str, Any], job: Job, prompts: list[str], actor: nn.Module, start: Path, curve: HeldOutCurve
) -> Any:
    """Return TRL 1.12's trainer, with prompts in order, a critic on a copy of the start, and the rule's score."""
    # Not an import statement: those of TRL's private names belong in trl_ext/_trl.py, for the supported version.
    module = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    task, load = TASKS[job["task"]], module.DataLoader
    module.DataLoader = lambda *args, **kwargs: load(*args, **kwargs | {"shuffle": False})
    try:
        critic = load_start(start, AutoModelForSequenceClassification, num_labels=1)
        nn.init.zeros_(critic.score.weight)
        told |= {"total_episodes": job["samples"], "stop_token": "eos", "num_sample_generations": 0}
        told |= {"response_length": task.limit}
        words = tokenizer()
        return module.PPOTrainer(
            module.PPOConfig(**told),
            processing_class=words,
            model=actor,
            ref_model=load_start(start),
            reward_model=RuleReward(task),
            value_model=critic,
            train_dataset=Dataset.from_dict({"input_ids": [words(prompt)["input_ids"] for prompt in prompts]}),
            callbacks=[curve],
        )
    finally:
        module.DataLoader = load


def run(job: Job, starts: Path) -> dict[str, Any]:
    """Train, and return the curve of the held-out score over samples, and the seconds of training alone."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, curve = build(job, starts, folder)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start - curve.seconds
    if len(curve.points) != job["measurements"] + 1:
        raise RuntimeError(f"{job['trainer']} was measured {len(curve.points)} times, not {job['measurements'] + 1}.")
    return {"job": job, "curve": curve.points, "seconds": seconds}


def main(argv: Sequence[str]) -> None:
    given = json.loads(Path(argv[0]).read_text())
    for job in given["jobs"]:
        if time.time() > given["until"]:
            break
        try:
            result = run(job, Path(given["starts"]))
        except (ValueError, RuntimeError) as error:  # a policy that has come apart, say; the others are measured
            result = {"job": job, "error": f"{type(error).__name__}: {error}"}
        print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
