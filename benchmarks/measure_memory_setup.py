"""What the runs of `measure_memory.py` need: their options, random models, random prompts and pairs."""

import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast


def config(vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": False}
    return sizes | {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": 4096} | more


DEEP = config(8192, 512, 2048, 8, 8, 8)
GROUPED = config(8192, 768, 2304, 8, 12, 4)
WIDE = config(65536, 512, 2048, 2, 8, 2, tie_word_embeddings=True)
TINY = config(256, 32, 64, 2, 2, 2)


def job(
    trainer: str,
    shape: dict[str, Any],
    batch: tuple[int, int],
    lengths: tuple[int, int],
    peft: str = "",
    processes: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """A run: `batch` is a micro-batch and how many of them make a rollout or step; `peft` is "lora" or "qlora"."""
    common = {"per_device_train_batch_size": batch[0], "gradient_accumulation_steps": batch[1]}
    common |= {"gradient_checkpointing": False} | options
    if trainer == "ppo":
        # No response ends early: the token that would end it is not in the vocabulary.
        common = {"response_length": lengths[1], "num_ppo_epochs": 1, "stop_token_id": shape["vocab_size"]} | common
    else:
        common = {"max_length": sum(lengths)} | common
    run = {"trainer": trainer, "config": shape, "prompt": lengths[0], "response": lengths[1], "options": common}
    return run | {"use_peft": bool(peft), "load_in_4bit": peft == "qlora", "rank": 16, "processes": processes}


# configs/accelerate/fsdp2.yaml, as options.
FSDP = {
    "processes": 2,
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"},
}

RUNS = {
    "ppo-model": job("ppo", DEEP, (4, 1), (64, 64)),
    "ppo-model-long": job("ppo", DEEP, (8, 1), (192, 128)),
    "ppo-model-grouped": job("ppo", GROUPED, (4, 1), (128, 64), kl_coef=0.0),
    "ppo-head": job("ppo", DEEP, (8, 1), (128, 64), critic="head"),
    "ppo-head-accumulated": job("ppo", DEEP, (4, 4), (128, 64), critic="head"),
    "ppo-head-checkpointing": job("ppo", DEEP, (16, 1), (256, 64), critic="head", gradient_checkpointing=True),
    "ppo-head-two-processes": job("ppo", DEEP, (4, 1), (128, 64), critic="head", processes=2),
    "ppo-head-wide": job("ppo", WIDE, (8, 1), (64, 64), critic="head"),
    "ppo-lora-rollout": job("ppo", DEEP, (1, 16), (256, 16), "lora", critic="head", gradient_checkpointing=True),
    "ppo-lora": job("ppo", DEEP, (8, 1), (128, 128), "lora", critic="head"),
    "ppo-lora-model": job("ppo", DEEP, (8, 1), (128, 64), "lora"),
    "ppo-qlora": job("ppo", GROUPED, (8, 1), (128, 64), "qlora", critic="head"),
    "dpo-full": job("dpo", DEEP, (4, 1), (256, 64)),
    "dpo-separate": job("dpo", DEEP, (4, 1), (256, 64), packing=False),
    "dpo-precomputed": job("dpo", GROUPED, (2, 2), (128, 128), precompute_ref_log_probs=True),
    "dpo-lora": job("dpo", DEEP, (4, 1), (256, 64), "lora"),
    "dpo-wide": job("dpo", WIDE, (4, 1), (64, 64)),
    "reward-full": job("reward", DEEP, (4, 1), (256, 64)),
    "reward-lora": job("reward", DEEP, (4, 2), (256, 64), "lora", gradient_checkpointing=True),
    "fsdp-ppo-model": job("ppo", DEEP, (4, 1), (64, 64), **FSDP),
    "fsdp-dpo-lora": job("dpo", DEEP, (2, 1), (128, 64), "lora", **FSDP),
    "tiny": job("ppo", TINY, (2, 1), (8, 4)),
}


def save_models(sizes: dict[str, Any], folder: Path) -> None:
    """Random actor and reward model with a tokenizer of one token a word."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, sizes["vocab_size"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    for name, architecture in {"actor": LlamaForCausalLM, "reward": LlamaForSequenceClassification}.items():
        architecture(LlamaConfig(**sizes, num_labels=1, pad_token_id=0)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def rows(job: dict[str, Any], count: int) -> Dataset:
    """Random prompts, or pairs; every other prompt is shorter by half, so that batches are padded."""
    rng = random.Random(0)

    def ids(size: int) -> list[int]:
        return [rng.randrange(1, job["vocabulary"]) for _ in range(size)]

    if job["trainer"] == "ppo":
        return Dataset.from_list([{"input_ids": ids(job["prompt"] // (1 + i % 2))} for i in range(count)])
    words = [
        [" ".join(f"w{i}" for i in ids(n)) for n in (job["prompt"], *[job["response"] - 1] * 2)] for _ in range(count)
    ]
    return Dataset.from_list(
        [
            {"prompt": p, "chosen": f" {chosen} <end>", "rejected": f" {rejected} <end>"}
            for p, chosen, rejected in words
        ]
    )
