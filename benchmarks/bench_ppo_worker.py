"""
One run of `bench_ppo.py`, in a process of its own: TRL 1.12's `PPOTrainer`, torchtune's recipe or
`PPOTrainerX` takes a few updates, and
the seconds of each by phase and the peak memory of the process are written as JSON.

It runs in each trainer's environment: `python bench_ppo_worker.py '{"trainer": "head", "batch": 16, ...}'`.
"""

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_ppo_setup import BASELINE, BUDGET, END, TORCHTUNE, lengths, listed_answers, random_model, tokenizer
from datasets import Dataset
from transformers import LogitsProcessor, TrainerCallback


def now() -> float:
    """Return the time once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


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
        self.start, self.cpu_start = now(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps_per_update:
            return
        end, cpu = now(), time.process_time()
        seconds = {"generate": self.generate, "learn": end - self.learning_since, "total": end - self.start}
        seconds["score"] = seconds["total"] - seconds["generate"] - seconds["learn"]
        self.updates.append(seconds | {"cpu": cpu - self.cpu_start})
        self.start, self.cpu_start, self.generate, self.learning_since = end, cpu, 0.0, None

    def generating(self, function: Callable) -> Callable:
        """`function`, whose seconds count as generation."""

        def call(*args, **kwargs):
            start = now()
            result = function(*args, **kwargs)
            self.generate += now() - start
            return result

        return call

    def learning(self, function: Callable) -> Callable:
        """`function`, with which learning begins when it is first called with gradients on."""

        def call(*args, **kwargs):
            if torch.is_grad_enabled() and self.learning_since is None:
                self.learning_since = now()
            return function(*args, **kwargs)

        return call


class Listed(LogitsProcessor):
    """
    Makes `generate` give an update's listed answers. Rows that have ended may leave the batch: a row is known by the
    first token of its answer.
    """

    def __init__(self, answers: torch.Tensor, vocabulary: int, prompt: int):
        self.answers, self.prompt = answers, prompt
        self.row_of = torch.zeros(vocabulary, dtype=torch.long).index_copy(
            0, answers[:, 0], torch.arange(len(answers))
        )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = input_ids.size(1) - self.prompt
        rows = torch.arange(len(scores)) if written == 0 else self.row_of[input_ids[:, self.prompt]]
        scores[torch.arange(len(scores)), self.answers[rows, written]] = 1e30  # beyond any other, and its softmax is 1
        return scores


def options(job: dict[str, Any]) -> dict[str, Any]:
    """Return what both trainers are told: one mini-batch and micro-batch, bf16 on a GPU only, all activations kept."""
    sizes = {"per_device_train_batch_size": job["batch"], "gradient_accumulation_steps": 1, "num_mini_batches": 1}
    sizes |= {"num_ppo_epochs": job["epochs"], "response_length": job["response"]}
    sizes |= {"total_episodes": job["batch"] * job["updates"], "output_dir": job["output_dir"]}
    sizes |= {"stop_token_id": END} if job["answers"] else {}
    mathematics = {"kl_coef": 0.05, "temperature": 1.0, "learning_rate": 3e-6, "seed": 0}
    on_cpu = job["device"] == "cpu"
    machine = {"use_cpu": on_cpu, "bf16": not on_cpu, "dataloader_pin_memory": False, "gradient_checkpointing": False}
    quiet = {"num_sample_generations": 0, "logging_steps": job["epochs"], "save_strategy": "no", "report_to": "none"}
    return sizes | mathematics | machine | quiet | {"disable_tqdm": True}


def build(job: dict[str, Any], clock: UpdateClock) -> Any:
    """The trainer of the job on random models, with the clock at its phases."""
    config, prompts = job["config"], job["prompts"]
    generator = torch.Generator().manual_seed(0)
    size = (job["batch"] // job["num_generations"] * job["updates"], max(prompts))
    ids = torch.randint(config["vocab_size"], size, generator=generator).tolist()
    ids = [row[: prompts[i % len(prompts)]] for i, row in enumerate(ids)]
    if job["trainer"] in (BASELINE, TORCHTUNE):  # which know no groups: a prompt stands once for each answer
        ids = [row for row in ids for _ in range(job["num_generations"])]
    if job["trainer"] == TORCHTUNE:
        from bench_ppo_torchtune import build as build_torchtune

        return build_torchtune(job, clock, ids)
    critic, _, changed = job["trainer"].partition("-")
    build_model: dict[str, Any] = {"dtype": torch.bfloat16 if "lora" in job and job["device"] == "cuda" else None}
    if changed == "flash":
        build_model["attn_implementation"] = "flash_attention_2"
    roles: dict[str, Any] = {"processing_class": tokenizer(config["vocab_size"])}
    with torch.device(job["device"]):
        roles["model"] = random_model(config, **build_model)
        if "lora" not in job:
            roles["ref_model"] = random_model(config, **build_model)
        roles["reward_model"] = random_model(config, scores=True, **build_model)
        if critic != "head":
            roles["value_model"] = random_model(config, scores=True, **build_model)
    roles["train_dataset"] = Dataset.from_dict({"input_ids": ids})
    if job["trainer"] == BASELINE:
        return build_baseline(job, clock, roles)
    return build_ours(job, clock, roles, critic, changed)


def build_ours(job: dict[str, Any], clock: UpdateClock, roles: dict[str, Any], critic: str, changed: str) -> Any:
    """`PPOTrainerX` with one thing changed, or nothing."""
    from peft import LoraConfig

    from trl_ext import PPOConfigX, PPOTrainerX
    from trl_ext.packing import flex

    if job["answers"]:
        roles["processing_class"].pad_token = "w0"  # the actor has no embedding of the end token
    if "lora" in job:
        roles["peft_config"] = LoraConfig(r=job["lora"], target_modules="all-linear", task_type="CAUSAL_LM")
    if job.get("given"):
        roles["rollout_func"] = given_answers(job)
    if changed == "unshared":
        PPOConfigX.shares_prompts = False
    if changed == "pieces":
        flex.why_not = lambda *args: "switched off"
    budgets = {"budget": "micro_batch_tokens", "scored": "score_batch_tokens"}
    more = {budgets[changed]: BUDGET} if changed in budgets else {"packing": changed not in ("padded", "flash")}
    more |= {"critic": critic, "num_generations": job["num_generations"], "shuffle_dataset": False}
    args = PPOConfigX(**options(job) | more | job.get("options", {}))
    trainer = PPOTrainerX(args, callbacks=[clock], **roles)
    if changed == "unsampled":
        trainer._trunk_of_samples = None
    is_listed = job["answers"] and not job.get("given")
    trainer._generate = clock.generating(with_listed_answers(trainer, job) if is_listed else trainer._generate)
    trainer._compute_loss = clock.learning(trainer._compute_loss)
    return trainer


def build_baseline(job: dict[str, Any], clock: UpdateClock, roles: dict[str, Any]) -> Any:
    """TRL 1.12's trainer. It samples up to the limit and cuts later, so listed answers take the place of its own."""
    # Not an import statement: those of TRL's private names belong in trl_ext/_trl.py, for the supported version.
    module = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    generate, load, updates = module.batch_generation, module.DataLoader, iter(range(job["updates"]))

    def generate_listed(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sequences, logits = generate(*args, **kwargs)
        sequences[:, -job["response"] :] = listed_answers(job, next(updates))
        return sequences, logits

    def load_in_order(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **kwargs | {"shuffle": False})

    module.batch_generation = clock.generating(generate_listed if job["answers"] else generate)
    module.forward = clock.learning(module.forward)
    module.DataLoader = load_in_order
    return module.PPOTrainer(module.PPOConfig(**options(job)), callbacks=[clock], **roles)


def with_listed_answers(trainer: Any, job: dict[str, Any]) -> Callable:
    """Return the trainer's `_generate`, which samples as always and is given the listed answers token by token."""
    generate, updates = trainer._generate, iter(range(job["updates"]))
    of_model = type(trainer.model).generate

    def generate_listed(prompts: list[Any]) -> Any:
        longest = max(len(prompt.input_ids) for prompt in prompts)
        listed = Listed(listed_answers(job, next(updates)), job["config"]["vocab_size"], longest)

        def give(model: Any, *args: Any, logits_processor: Any = (), **kwargs: Any) -> Any:
            return of_model(model, *args, logits_processor=[*logits_processor, listed], **kwargs)

        type(trainer.model).generate = give
        try:
            return generate(prompts)
        finally:
            type(trainer.model).generate = of_model

    return generate_listed


def given_answers(job: dict[str, Any]) -> Callable:
    """Return a `rollout_func` that gives the listed answers without sampling."""
    updates = iter(range(job["updates"]))

    def give(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        of_rows = [length for _, of_group in lengths(job) for length in of_group]
        answers = [
            ids[:length] for ids, length in zip(listed_answers(job, next(updates)).tolist(), of_rows, strict=True)
        ]
        logprobs = [[0.0] * len(ids) for ids in answers]
        return {
            "prompt_ids": [prompt.input_ids for prompt in prompts],
            "completion_ids": answers,
            "logprobs": logprobs,
        }

    return give


def main(job: dict[str, Any]) -> None:
    is_ours = job["trainer"] not in (BASELINE, TORCHTUNE)
    clock = UpdateClock(steps_per_update=job["epochs"] if is_ours else 1)
    (trainer := build(job, clock)).train()
    on_cpu, learning = job["device"] == "cpu", 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_allocated()
    if is_ours:
        peak = max(peak, trainer.phases.highest)  # the counter is reset between them
        learning = max(line.get("memory/learn", 0.0) for line in trainer.state.log_history) * 2**30
    result = {"updates": clock.updates, "peak_gb": peak / 1e9, "learn_gb": learning / 1e9}
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
