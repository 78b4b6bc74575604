"""What the runs of `bench_dpo.py` need: shapes, random models, random pairs of given lengths, and their FLOPs."""

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM


# Shortest and longest, in tokens.
Lengths = tuple[int, int]

# fmt: off
TINY = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2}
DEEP = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8}
# The widths of Qwen2.5-0.5B
WIDE = {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 2,
        "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
# Qwen2.5 in three sizes, for GPUs
HALF_B = WIDE | {"num_hidden_layers": 24}
ONE_AND_A_HALF_B = WIDE | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                           "num_attention_heads": 12, "num_key_value_heads": 2}
SEVEN_B = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4}
# fmt: on


def shape(
    config: dict[str, Any], pairs: int, prompt: Lengths, completion: Lengths, default: bool = True
) -> dict[str, Any]:
    """Pairs per step, and between which lengths their prompts and completions are drawn."""
    return {"config": config, "pairs": pairs, "prompt": prompt, "completion": completion, "default": default}


SHAPES = {
    "tiny": shape(TINY, 2, (4, 8), (2, 4), default=False),
    "deep-256+64": shape(DEEP, 4, (256, 256), (64, 64)),
    "wide-256+64": shape(WIDE, 2, (256, 256), (64, 64)),
    "deep-64+192": shape(DEEP, 4, (64, 64), (192, 192)),
    "wide-64+192": shape(WIDE, 2, (64, 64), (192, 192)),
    "deep-mixed": shape(DEEP, 4, (32, 512), (16, 256)),
    "0.5b-1024+256": shape(HALF_B, 8, (1024, 1024), (256, 256), default=False),
    "1.5b-1024+256": shape(ONE_AND_A_HALF_B, 4, (1024, 1024), (256, 256), default=False),
    "7b-1024+256": shape(SEVEN_B, 1, (1024, 1024), (256, 256), default=False),
}


def random_model(shape: dict[str, Any], dtype: torch.dtype) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**shape["config"], bos_token_id=None, eos_token_id=0)).to(dtype)


def tokenizer(shape: dict[str, Any]) -> PreTrainedTokenizerFast:
    """One token per word: "w7" is token 7; token 0 ends and pads."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, shape["config"]["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def lengths(shape: dict[str, Any], steps: int) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected completion, for all pairs of a run."""
    rng = random.Random(0)
    draw = [shape["prompt"], shape["completion"], shape["completion"]]
    return [tuple(rng.randint(*between) for between in draw) for _ in range(steps * shape["pairs"])]


def pairs(shape: dict[str, Any], steps: int) -> Dataset:
    """Random pairs of these lengths; TRL closes a completion with the end token, which is its last."""
    rng, size = random.Random(1), shape["config"]["vocab_size"]

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(1, size)}" for _ in range(count))

    rows = []
    for prompt, chosen, rejected in lengths(shape, steps):
        completions = {name: f" {text(n - 1)} <end>" for name, n in (("chosen", chosen), ("rejected", rejected))}
        rows.append({"prompt": text(prompt), **completions})
    return Dataset.from_list(rows)


def forward_flops(config: dict[str, Any]) -> tuple[float, float, float]:
    """Return what a forward pass costs: the layers per token and per token that a token attends to, and its logits."""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    kv_width = width * config["num_key_value_heads"] // config["num_attention_heads"]
    per_token = 2 * layers * (2 * width * (width + kv_width) + 3 * width * config["intermediate_size"])
    return per_token, 4 * layers * width, 2 * width * config["vocab_size"]


def flops(shape: dict[str, Any], steps: int = 64) -> tuple[float, float]:
    """
    Of TRL and of shared rows: layers and attention for every token, padding included where rows are padded, and the
    LM head for every scored position. TRL scores what it reads, as its kernel for GPUs does. A training pass costs
    three forward passes, the reference one; the ratio is the same.
    """
    per_token, per_context, head = forward_flops(shape["config"])
    theirs = ours = 0.0
    all_lengths = lengths(shape, steps)
    for start in range(0, len(all_lengths), shape["pairs"]):
        batch = all_lengths[start : start + shape["pairs"]]
        longest = max(prompt + max(completions) for prompt, *completions in batch)
        scored = head * sum(chosen + rejected for _, chosen, rejected in batch)
        theirs += 2 * len(batch) * (longest * per_token + longest**2 / 2 * per_context) + scored
        for prompt, *completions in batch:
            contexts = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in completions)
            ours += (prompt + sum(completions)) * per_token + contexts * per_context
        ours += scored
    return theirs, ours
