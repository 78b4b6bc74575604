"""What the runs of `bench_ppo.py` need: shapes, their FLOPs, random models, and environments of other trainers."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_dpo_setup import DEEP, HALF_B, ONE_AND_A_HALF_B, SEVEN_B, TINY, WIDE, forward_flops
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)


BASELINE, TORCHTUNE = "trl-1.12", "torchtune-0.6.1"
# What the trainers that need an environment of their own need there.
ENVIRONMENTS = {
    BASELINE: ["trl==1.12.0", "torch", "peft", "pandas"],
    TORCHTUNE: ["torchtune==0.6.1", "torchao==0.9.0", "torch", "transformers"],
}
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"

# The token that ends a listed answer.
END = 1
# Answers in shares of the limit, with mean 0.4: a few are cut off, most are short.
TAIL = (1, 1, 1, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.1, 0.05, 0.03, 0.02)
# Tokens of prompts, spread evenly from 32 to 256.
PROMPTS = [32 + 15 * row for row in range(15)] + [256]


def tail(limit: int) -> list[int]:
    """Return the tokens of 16 answers."""
    return [round(limit * share) for share in TAIL]


def shape(
    trainers: list[str],
    config: dict[str, Any],
    epochs: int,
    prompts: list[int],
    response: int,
    answers: list[int] | None = None,
    batch: int = 16,
    num_generations: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """
    Return what is measured, on models with this `Qwen2Config`.

    Args:
        trainers: the rows of the table. The value of `critic`, perhaps with one thing changed: "-padded" has
            `packing=False`, "-flash" too, with flash-attention, "-pieces" attends without FlexAttention, "-unshared"
            reads a prompt once per answer, "-budget" has `micro_batch_tokens=BUDGET`, "-scored"
            `score_batch_tokens=BUDGET`, "-unsampled" samples by transformers alone.
        epochs: passes over an update's answers.
        prompts, answers: tokens of each, over and over; without `answers` all have `response` tokens.
        batch: answers per update, learned from in one micro-batch.
        more: `given`, answers are not sampled by `PPOTrainerX`; `lora`, the rank; `options` of `PPOConfigX`.
    """
    job = more | {"config": config, "epochs": epochs, "batch": batch, "prompts": prompts, "response": response}
    return {"trainers": trainers, "job": job | {"answers": answers, "num_generations": num_generations}}


BUDGET = 1024
OF_GROUPS = ["model-padded", "model-unshared", "model", "model-scored", "model-budget"]
ON_GPU = ["model-padded", "model-flash", "model-pieces", "model", "head"]
SHAPES = {
    "tiny": shape([BASELINE, TORCHTUNE, "model", "head"], TINY, 2, [8], 8, batch=4),
    "tiny-varied": shape(
        [BASELINE, TORCHTUNE, "head-padded", "head"], TINY, 2, [9, 3, 5, 2], 8, [8, 1, 4, 6], batch=4
    ),
    "deep": shape([BASELINE, TORCHTUNE, "model-padded", "model"], DEEP, 4, [64], 64),
    "wide": shape([BASELINE, TORCHTUNE, "model", "head"], WIDE, 1, [64], 64),
    "varied-answers": shape(
        [BASELINE, TORCHTUNE, "model-padded", "model", "head-padded", "head"], DEEP, 4, [64], 64, tail(64)
    ),
    "varied": shape(
        [BASELINE, TORCHTUNE, "model-padded", "model-unsampled", "model", "model-budget"],
        DEEP,
        4,
        PROMPTS,
        128,
        tail(128),
    ),
    "wide-varied-answers": shape([BASELINE, TORCHTUNE, "head-padded", "head"], WIDE, 1, [64], 64, tail(64)),
    "groups": shape(OF_GROUPS, DEEP, 4, [256], 64, [64], num_generations=8),
    "groups-varied": shape(OF_GROUPS, DEEP, 4, [256], 128, tail(128), num_generations=8),
    "varied-groups": shape(OF_GROUPS, DEEP, 4, [32, 256], 128, tail(128), num_generations=8),
    # For GPUs. Sampling up to 1024 tokens would take most of the time there, and is left out.
    "0.5b": shape([BASELINE, *ON_GPU], HALF_B, 1, PROMPTS, 1024, tail(1024), given=True),
    "1.5b": shape([BASELINE, *ON_GPU], ONE_AND_A_HALF_B, 1, PROMPTS, 1024, tail(1024), given=True),
    "7b-lora": shape(
        ["head-padded", "head-flash", "head-pieces", "head"],
        SEVEN_B,
        1,
        PROMPTS,
        1024,
        tail(1024),
        given=True,
        lora=16,
        options={"gradient_checkpointing": True},
    ),
    "tiny-lora": shape(["head-padded", "head-pieces", "head"], TINY, 2, [8], 8, [8, 4], batch=4, given=True, lora=4),
}


def lengths(job: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Return the groups of an update: tokens of the prompt, and of each of its answers."""
    n, answers = job["num_generations"], job["answers"] or [job["response"]]
    of_rows = [answers[7 * row % len(answers)] for row in range(job["batch"])]  # 7: not in order of length
    prompts = [job["prompts"][i % len(job["prompts"])] for i in range(job["batch"] // n)]
    return [(prompt, of_rows[n * i : n * (i + 1)]) for i, prompt in enumerate(prompts)]


def listed_answers(job: dict[str, Any], update: int) -> torch.Tensor:
    """Return random answers of the listed lengths, (batch, response): `END` closes those that are not cut off."""
    generator = torch.Generator().manual_seed(update)
    size = (job["batch"], job["response"])
    answers = torch.randint(END + 1, job["config"]["vocab_size"], size, generator=generator)
    answers[:, 0] = END + 1 + torch.arange(job["batch"])  # by which the worker knows them
    for answer, length in zip(answers, (length for _, of_group in lengths(job) for length in of_group), strict=True):
        answer[length if length == job["response"] else length - 1 :] = END
    return answers


def update_flops(job: dict[str, Any], critic: str) -> float:
    """
    Return the floating-point operations of the matrices in an update, for the tokens that count: no padding, the
    prompt of a group once, logits of answers only. A model's backward pass costs two of its forward passes.
    """
    per_token, per_context, per_logits = forward_flops(job["config"])
    trunk = head = 0.0
    for prompt, answers in lengths(job):
        contexts = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in answers)
        trunk += (prompt + sum(answers)) * per_token + contexts * per_context
        head += sum(answers) * per_logits
    generate = 0 if job.get("given") else trunk + head
    score = (trunk + head) + trunk + trunk  # reference, reward model, critic or the actor's trunk under its head
    passes = 2 if job.get("lora") else 3  # frozen weights need no gradient
    learn = passes * (trunk + head + (0 if critic == "head" else trunk))
    return generate + score + job["epochs"] * learn


def matrix_rate(config: dict[str, Any], device: str, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of a large product with a model's widths; the best of ten."""
    tokens, width, inner = 2048, config["hidden_size"], config["intermediate_size"]
    states = torch.randn(tokens, width, device=device, dtype=dtype)
    weight = torch.randn(width, inner, device=device, dtype=dtype)
    repeats, best = (100 if device == "cuda" else 5), float("inf")
    for _ in range(11):  # the first warms up
        start = time.perf_counter()
        for _ in range(repeats):
            states @ weight
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return repeats * 2 * tokens * width * inner / best


def python_of(trainer: str, folder: Path) -> str:
    """Return the interpreter of a trainer's own environment, made if it is not there; all else is as pinned."""
    if trainer not in ENVIRONMENTS:
        return sys.executable
    folder /= f"bench-{trainer}"
    python, pins = folder / "bin" / "python", folder / "constraints.txt"
    if not (folder / "complete").exists():
        print(f"Making an environment for {trainer} in {folder}; this happens once.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        pinned = CONSTRAINTS.read_text().splitlines(keepends=True)
        pins.write_text("".join(line for line in pinned if not line.startswith("trl==")))
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-c", pins]
        subprocess.run([*install, *ENVIRONMENTS[trainer]], check=True)
        (folder / "complete").touch()
    return str(python)


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One token per word; the end token, which also pads, lies behind the actor's vocabulary: no answer ends early."""
    words = {f"w{i}": i for i in range(vocabulary)} | {"<end>": vocabulary}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>", padding_side="left")


def random_model(config: dict[str, Any], scores: bool = False, **options: Any) -> Any:
    """Return a random actor, or a reward model, which reads the end token behind each answer; the same each time."""
    set_seed(0)
    config = config | {"bos_token_id": None, "eos_token_id": None, "num_labels": 1}
    if not scores:
        return AutoModelForCausalLM.from_config(Qwen2Config(**config), **options)
    config |= {"vocab_size": config["vocab_size"] + 1, "pad_token_id": config["vocab_size"]}
    return AutoModelForSequenceClassification.from_config(Qwen2Config(**config), **options)
