"""What the runs of `bench_ppo.py` need: shapes, random models, and an environment with TRL 1.12."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    set_seed,
)


BASELINE = "trl-1.12"
CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def shape(critics: list[str], batch: int, length: int, epochs: int, **config: Any) -> dict[str, Any]:
    """
    Return what is measured, on models with this `Qwen2Config`.

    Args:
        critics: the values of `critic` to measure beside the baseline.
        batch: responses per update, learned from in one micro-batch.
        length: tokens of a prompt, and of a response.
        epochs: passes over an update's responses.
    """
    job = {"batch": batch, "prompt": length, "response": length, "epochs": epochs}
    return {"trainers": [BASELINE, *critics], "config": config, "job": job | {"vocabulary": config["vocab_size"]}}


# Tokens of prompts, spread evenly, and of answers, in shares of the limit: a few are cut off, most are short.
PROMPTS = [32 + 15 * row for row in range(16)]
ANSWERS = [
    round(128 * share) for share in (1, 1, 1, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.1, 0.05, 0.03, 0.02)
]


# fmt: off
SHAPES = {
    "tiny": shape(
        ["model", "head"], batch=4, length=8, epochs=2, vocab_size=256, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    ),
    "deep": shape(
        ["model"], batch=16, length=64, epochs=4, vocab_size=8192, hidden_size=512, intermediate_size=2048,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
    ),
    # The widths of Qwen2.5-0.5B
    "wide": shape(
        ["model", "head"], batch=16, length=64, epochs=1, vocab_size=151936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
}
SHAPES["varied"] = SHAPES["deep"] | {"trainers": ["model-padded", "model", "head-padded", "head"]}
SHAPES["varied"]["job"] = SHAPES["deep"]["job"] | {"prompts": PROMPTS, "answers": ANSWERS, "response": max(ANSWERS)}
# Eight answers to each prompt of 256 tokens, of 64 tokens or of the varied lengths
for name, answers in {"groups": [64] * 16, "groups-varied": ANSWERS}.items():
    SHAPES[name] = SHAPES["varied"] | {"trainers": ["model-padded", "model"]}
    of_groups = {"prompts": [256], "answers": answers, "response": max(answers), "num_generations": 8}
    SHAPES[name]["job"] = SHAPES["varied"]["job"] | of_groups
# fmt: on


def baseline_python(folder: Path) -> str:
    """The interpreter of the environment with TRL 1.12, which is made if it is not there; all else is as pinned."""
    python, pins = folder / "bin" / "python", folder / "constraints.txt"
    if not (folder / "complete").exists():
        print(f"Making an environment with TRL 1.12 in {folder}; this happens once.", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
        pins.write_text("".join(line for line in CONSTRAINTS.open() if not line.startswith("trl==")))
        install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "-c", pins]
        subprocess.run([*install, "trl==1.12.0", "torch", "peft", "pandas"], check=True)
        (folder / "complete").touch()
    return str(python)


def save_models(config: dict[str, Any], folder: Path) -> None:
    """
    Random actor and reward model. The actor's vocabulary lacks the end token, so no response ends early; the reward
    model reads one behind each.
    """
    set_seed(0)
    size = config["vocab_size"]
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)} | {"<end>": size}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    config = config | {"bos_token_id": None, "eos_token_id": None, "num_labels": 1}
    for name, architecture in {"actor": Qwen2ForCausalLM, "reward": Qwen2ForSequenceClassification}.items():
        known = size + (name == "reward")
        architecture(Qwen2Config(**config | {"vocab_size": known})).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
