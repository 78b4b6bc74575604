"""docs/metrics.md names every key that runs of DPO and of reward models log, and docs/dpo.md every option of DPO."""

import dataclasses
import re
from pathlib import Path

import pytest
from datasets import Dataset
from trl import DPOConfig, RewardConfig, RewardTrainer

import tiny
from trainer_keys import FROM_THE_TRAINER
from trl_ext import DPOConfigX, DPOTrainerX


ROOT = Path(__file__).resolve().parents[2]
# Of TRL and transformers, on the way through a run.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def read(name):
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def documented(title):
    """The keys that open a row of a section."""
    section = read("metrics.md").split(f"\n## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)


def check(logged, rows, only_in_training=()):
    """Every key is documented and every documented key is logged, in training and in an evaluation."""
    assert len(rows) == len(set(rows))
    assert {key for key in logged if not key.startswith("eval_")} == set(rows)
    of_pairs = {key for key in rows if not key.startswith(only_in_training)}
    assert {key.removeprefix("eval_") for key in logged if key.startswith("eval_")} == of_pairs


def keys_of_a_run(trainer_class, config_class, folder, model, **more):
    texts = tiny.tiny_prompts(8)["prompt"]
    rows = [
        {"prompt": "the", "chosen": f" good {text}", "rejected": " bad film" * (1 + i % 3), "source": "ab"[i % 2]}
        for i, text in enumerate(texts)
    ]
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none"}
    args = config_class(
        str(folder), **options, **more, bf16=False, eval_strategy="steps", eval_steps=1, save_strategy="no"
    )
    trainer = trainer_class(
        model, args=args, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows)
    )
    trainer.train()
    return {key for line in trainer.state.log_history for key in line}


def test_every_key_of_dpo_is_documented_and_every_documented_key_is_logged(tmp_path):
    model = tiny.save_tiny(tmp_path)["actor"]
    experts = str(tmp_path / "experts")
    tiny.tiny_mixture().save_pretrained(experts)
    tiny.tiny_tokenizer().save_pretrained(experts)
    keys = keys_of_a_run(DPOTrainerX, DPOConfigX, tmp_path / "all", model, precompute_ref_log_probs=True)
    keys |= keys_of_a_run(DPOTrainerX, DPOConfigX, tmp_path / "auxiliary", experts)
    logged = {re.sub(r"(preference/accuracy)/\w+", r"\1/<source>", key) for key in keys - FROM_THE_TRAINER}
    check(logged, documented("DPO"), ("time/", "memory/", "tokens_per_second"))


def test_every_key_of_a_reward_run_is_documented_and_every_documented_key_is_logged(tmp_path):
    model = tiny.save_tiny(tmp_path)["reward_model"]
    keys = keys_of_a_run(RewardTrainer, RewardConfig, tmp_path / "reward", model)
    check(keys - FROM_THE_TRAINER, documented("Reward models"))


def test_every_option_beyond_trls_is_on_the_page():
    of_trl = {field.name for field in dataclasses.fields(DPOConfig)}
    added = {field.name for field in dataclasses.fields(DPOConfigX)} - of_trl
    rows = set(re.findall(r"^\| `([^`]+)` \|", read("dpo.md"), flags=re.MULTILINE))
    assert rows == added | {"label_smoothing"}
