"""
One run of `bench_ppo.py`, in a process of its own: TRL 1.12's `PPOTrainer` or `PPOTrainerX` takes a few updates, and
the seconds of each by phase and the peak memory of the process are written as JSON.

It runs in either environment: `python bench_ppo_worker.py '{"trainer": "head", "batch": 16, ...}'`.
"""

import functools
import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


class UpdateClock(TrainerCallback):
    """
    Seconds of each update, from the end of the one before it, and of its phases: generate, score (all else before
    learning) and learn; and `cpu`, the seconds that all threads of the process computed.

    Args:
        steps_per_update: the steps that the trainer counts in one update.
    """

    def __init__(self, steps_per_update: int):
        self.steps_per_update = steps_per_update
        self.updates: list[dict[str, float]] = []
        self.generate = 0.0
        self.learning_since: float | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_update:
            return
        now, cpu = time.perf_counter(), time.process_time()
        seconds = {"generate": self.generate, "learn": now - self.learning_since, "total": now - self.start}
        seconds["score"] = seconds["total"] - seconds["generate"] - seconds["learn"]
        self.updates.append(seconds | {"cpu": cpu - self.cpu_start})
        self.start, self.cpu_start, self.generate, self.learning_since = now, cpu, 0.0, None

    def generating(self, function: Callable) -> Callable:
        """`function`, whose seconds count as generation."""

        def call(*args, **kwargs):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.generate += time.perf_counter() - start
            return result

        return call

    def learning(self, function: Callable) -> Callable:
        """`function`, with which learning begins when it is first called with gradients on."""

        def call(*args, **kwargs):
            if torch.is_grad_enabled() and self.learning_since is None:
                self.learning_since = time.perf_counter()
            return function(*args, **kwargs)

        return call


def options(job: dict[str, Any]) -> dict[str, Any]:
    """Return what both trainers are told: one mini-batch and one micro-batch, float32, no gradient checkpointing."""
    sizes = {"per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1, "num_mini_batches": 1}
    sizes |= {"num_ppo_epochs": job["epochs"], "response_length": job["response"]}
    sizes |= {"total_episodes": job["batch"] * job["updates"], "output_dir": job["output_dir"]}
    mathematics = {"kl_coef": 0.05, "temperature": 1.0, "learning_rate": 3e-6, "seed": 0}
    machine = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    quiet = {"num_sample_generations": 0, "logging_steps": job["epochs"], "save_strategy": "no", "report_to": "none"}
    return sizes | mathematics | machine | quiet | {"disable_tqdm": True}


def build(job: dict[str, Any], clock: UpdateClock) -> Any:
    """The trainer of the job on models from files, with the clock at its phases."""
    folder = Path(job["models"])
    generator = torch.Generator().manual_seed(0)
    lengths = job.get("prompts") or [job["prompt"]]
    size = (job["batch"] * job["updates"], max(lengths))
    ids = torch.randint(job["vocabulary"], size, generator=generator).tolist()
    ids = [row[: lengths[i % len(lengths)]] for i, row in enumerate(ids)]
    roles = {
        "processing_class": AutoTokenizer.from_pretrained(folder / "actor", padding_side="left"),
        "model": AutoModelForCausalLM.from_pretrained(folder / "actor"),
        "ref_model": AutoModelForCausalLM.from_pretrained(folder / "actor"),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(folder / "reward"),
        "train_dataset": Dataset.from_dict({"input_ids": ids}),
    }
    critic, _, padded = job["trainer"].partition("-")
    if critic != "head":
        roles["value_model"] = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    if job["trainer"] == "trl-1.12":
        # Not an import statement: those of TRL's private names belong in trl_ext/_trl.py, for the supported version.
        module = importlib.import_module("trl.experimental.ppo.ppo_trainer")
        module.batch_generation = clock.generating(module.batch_generation)
        module.forward = clock.learning(module.forward)
        return module.PPOTrainer(module.PPOConfig(**options(job)), callbacks=[clock], **roles)
    from trl_ext import PPOConfigX, PPOTrainerX

    if "answers" in job:
        roles["rollout_func"] = functools.partial(given_answers, job=job)
        roles["processing_class"].pad_token = "w0"  # the actor has no embedding of the end token
    more = {"shuffle_dataset": False} if "prompts" in job else {}
    more |= {name: job[name] for name in ("num_generations",) if name in job}
    args = PPOConfigX(**options(job), **more, critic=critic, packing=not padded)
    trainer = PPOTrainerX(args, callbacks=[clock], **roles)
    trainer._generate = clock.generating(trainer._generate)
    trainer._compute_loss = clock.learning(trainer._compute_loss)
    return trainer


def given_answers(prompts: list[Any], trainer: Any, job: dict[str, Any]) -> dict[str, list[Any]]:
    """Random answers of the job's lengths, in an order of their own."""
    rows = range(len(prompts))
    lengths = [job["answers"][7 * row % len(job["answers"])] for row in rows]
    answers = [torch.randint(job["vocabulary"], (length,)).tolist() for length in lengths]
    logprobs = [[0.0] * length for length in lengths]
    return {"prompt_ids": [prompt.input_ids for prompt in prompts], "completion_ids": answers, "logprobs": logprobs}


def main(job: dict[str, Any]) -> None:
    clock = UpdateClock(steps_per_update=1 if job["trainer"] == "trl-1.12" else job["epochs"])
    (trainer := build(job, clock)).train()
    of_phases = 0 if job["trainer"] == "trl-1.12" else trainer.phases.highest  # the counter is reset between them
    peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, of_phases)
    Path(job["result"]).write_text(json.dumps({"updates": clock.updates, "peak_gb": peak / 1e9}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
