"""Pairs, tiny models of several architectures and short DPO runs, for the tests of `trl_ext.dpo`."""

import random
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

import tiny
from trl_ext import DPOConfigX, DPOTrainerX


OURS, TRLS = (DPOTrainerX, DPOConfigX), (DPOTrainer, DPOConfig)

SIZES = {
    "vocab_size": len(tiny.VOCABULARY),
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = ["sliding_attention", "full_attention"]

# Name -> class prefix and what its config needs beside `SIZES`.
ARCHITECTURES = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "mistral_short_window": ("Mistral", {"sliding_window": 6}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 64,
            "layer_types": ALTERNATING,
            "attn_implementation": "eager",
        },
    ),
    "gemma2_short_window": (
        "Gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 4,
            "layer_types": ALTERNATING,
            "attn_implementation": "eager",
        },
    ),
    "stablelm": ("StableLm", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gpt2": (
        "GPT2",
        {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 128,
            **dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
        },
    ),
    "opt": (
        "OPT",
        {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.2},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "falcon_alibi": ("Falcon", {"alibi": True, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "mamba": ("Mamba", {"state_size": 4}),
    "qwen3_next": (
        "Qwen3Next",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}


def tiny_model(name: str = "llama", seed: int = 0, **overrides: Any) -> nn.Module:
    """A causal LM of an architecture, in float32 and evaluation mode. The seed alone decides its weights."""
    prefix, options = ARCHITECTURES[name]
    options = SIZES | options | overrides
    attention = options.pop("attn_implementation", None)
    if name == "gpt2":  # its names for the sizes
        options = {key: value for key, value in options.items() if key.startswith("n_") or key not in _NOT_GPT2}
    config = getattr(transformers, f"{prefix}Config")(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


_NOT_GPT2 = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}


def with_adapter(model: nn.Module, seed: int = 3) -> nn.Module:
    """A `PeftModel` whose adapter "default" already differs from 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choices(tiny.WORDS, k=rng.randint(low, high)))


def tiny_pairs(size: int = 8, seed: int = 0, prompt: tuple[int, int] = (1, 8)) -> Dataset:
    """Pairs of text; one rejected goes on where the chosen one ends, one is but the eos, two begin alike for long."""
    rng = random.Random(seed)
    rows = [
        {"prompt": words(rng, *prompt) + " ", "chosen": words(rng, 1, 6), "rejected": words(rng, 1, 6)}
        for _ in range(size)
    ]
    rows[1]["rejected"] = rows[1]["chosen"] + " one"
    rows[2]["rejected"] = "<eos>"
    beginning = words(rng, 8, 8)
    rows[3] |= {"chosen": f"{beginning} good", "rejected": f"{beginning} bad"}
    return Dataset.from_list(rows)


def said(role: str, text: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": text}]


def chat(prompt: str, chosen: str, rejected: str, **columns: Any) -> dict[str, Any]:
    """A row of conversations."""
    answers = {"chosen": said("assistant", chosen), "rejected": said("assistant", rejected)}
    return {"prompt": said("user", prompt), **answers, **columns}


def tiny_chats() -> Dataset:
    """`tiny_pairs` as conversations."""
    rows = [{name: text.strip().removesuffix("<eos>") for name, text in row.items()} for row in tiny_pairs().to_list()]
    return Dataset.from_list([chat(**row) for row in rows])


def batch_of(pairs: list[tuple[list[int], list[int], int]], pad: int = 0) -> dict[str, torch.Tensor]:
    """TRL's batch of (chosen ids, rejected ids, tokens of the prompt), padded on the right."""
    rows = [(chosen, prompt) for chosen, _, prompt in pairs] + [(rejected, prompt) for _, rejected, prompt in pairs]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows])
    completion = mask * (torch.arange(length) >= torch.tensor([[prompt] for _, prompt in rows]))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(completion == 0, -100)}


def random_pairs(seed: int = 0) -> list[tuple[list[int], list[int], int]]:
    """Four pairs: a plain one, one whose completions begin alike, one only an eos longer, one with a prompt of 1."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [rng.randrange(3, 64) for _ in range(count)]

    plain, alike, longer, short = ids(6), ids(8), ids(5), ids(1)
    chosen = ids(3)
    return [
        ([*plain, 7, *ids(4)], [*plain, 8, *ids(2)], 6),
        ([*alike, 9, *ids(1)], [*alike, 10, *ids(3)], 4),
        (longer + chosen, [*longer, *chosen, 2], 5),
        ([*short, 11, *ids(2)], [*short, 12], 1),
    ]


def dpo_config(output_dir: str | Path, kind: type = DPOConfigX, **options: Any) -> Any:
    """4 pairs a batch, 2 steps of plain gradient descent, in which rounding errors stay small; `options` override."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(**(defaults | options))


def dpo_trainer(
    output_dir: str | Path, models: dict[str, Any] | None = None, side: tuple[type, type] = OURS, **options: Any
) -> Any:
    """A trainer with a tiny actor, another reference, and 8 pairs; `models`: arguments of the constructor."""
    trainer, config = side
    arguments = {
        "model": tiny_model(),
        "ref_model": tiny_model(seed=1),
        "processing_class": tiny.tiny_tokenizer(),
        "train_dataset": tiny_pairs(),
    }
    return trainer(args=dpo_config(output_dir, config, **options), **(arguments | (models or {})))


def dpo_run(output_dir: str | Path, models: dict[str, Any] | None = None, **options: Any) -> Any:
    """`dpo_trainer`, trained."""
    trainer = dpo_trainer(output_dir, models, **options)
    trainer.train()
    return trainer


def not_at_the_start() -> Any:
    """Within the context, a policy may differ from its reference at the first step, as after some steps."""
    return mock.patch.object(DPOTrainerX, "_is_at_start", return_value=False)


def lines(trainer: Any, key: str = "loss") -> list[dict[str, float]]:
    """The log lines that have `key`."""
    return [line for line in trainer.state.log_history if key in line]


class KeepGradients(TrainerCallback):
    """Keeps the gradients of every optimizer step, by name."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.steps.append({name.removeprefix("module."): gradient for name, gradient in named.items()})


def gradient_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """‖one − other‖ / ‖other‖ over all parameters."""
    assert one.keys() == other.keys()
    assert one, "there are no gradients"
    apart = sum((one[name] - gradient).double().square().sum() for name, gradient in other.items())
    size = sum(gradient.double().square().sum() for gradient in other.values())
    return (apart / size).sqrt().item()


@torch.no_grad()
def slow_logps(model: nn.Module, prompt: list[int], completion: list[int]) -> float:
    """log π(completion | prompt) in nats: one sequence, straight from the logits, in float64."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0].double()
    start = len(prompt)
    return sum(logits[t - 1].log_softmax(0)[ids[0, t]].item() for t in range(start, ids.size(1)))


def slow_rows(trainer: Any, dataset: Dataset, actor: nn.Module, reference: nn.Module) -> list[tuple[float, ...]]:
    """What the ledger is told of each prepared row: rewards, log-ratios, log-probs, lengths, one row at a time."""
    rows = []
    for row in dataset:
        sides = row["chosen_ids"], row["rejected_ids"]
        logps = [slow_logps(actor, row["prompt_ids"], y) for y in sides]
        ratios = [own - slow_logps(reference, row["prompt_ids"], y) for own, y in zip(logps, sides, strict=True)]
        rows.append((*(trainer.beta * ratio for ratio in ratios), *ratios, *logps, *map(len, sides)))
    return rows
