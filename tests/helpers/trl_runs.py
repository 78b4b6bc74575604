"""Short runs of TRL's own trainers on tiny models, for the callbacks, which must work with them."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import dpo_runs
import tiny
from ppo_runs import response_lengths


COMMON = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def grpo_trainer(folder: Path, **options: Any) -> GRPOTrainer:
    """4 steps of two prompts with two completions each, with a reference model."""
    folder.mkdir(parents=True, exist_ok=True)
    batch = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 5}
    args = GRPOConfig(str(folder), **(COMMON | batch | {"max_steps": 4, "beta": 0.1} | options))
    return GRPOTrainer(
        tiny.save_tiny(folder)["actor"],
        response_lengths,
        args,
        tiny.tiny_prompts(8),
        processing_class=tiny.tiny_tokenizer(),
    )


def dpo_trainer(folder: Path, **options: Any) -> Any:
    """TRL's own, on 8 pairs, with the same held out; its reference is a copy of the actor."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = dpo_runs.tiny_pairs()
    models = {"model": tiny.save_tiny(folder)["actor"], "ref_model": None, "eval_dataset": pairs}
    options = {"eval_strategy": "steps", "eval_steps": 1} | options
    return dpo_runs.dpo_trainer(folder, models, side=dpo_runs.TRLS, **options)


def reward_trainer(folder: Path, **options: Any) -> RewardTrainer:
    batch = {"per_device_train_batch_size": 4, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    args = RewardConfig(str(folder), **(COMMON | batch | options))
    rows = Dataset.from_list(
        [{"chosen": f"good {row['prompt']}", "rejected": "bad film"} for row in tiny.tiny_prompts(8)]
    )
    return RewardTrainer(
        tiny.tiny_reward_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny.tiny_tokenizer()
    )


def sft_trainer(folder: Path, **options: Any) -> SFTTrainer:
    args = SFTConfig(str(folder), **(COMMON | {"per_device_train_batch_size": 4, "max_steps": 2} | options))
    rows = Dataset.from_list([{"text": row["prompt"] + " good film"} for row in tiny.tiny_prompts(8)])
    return SFTTrainer(tiny.tiny_actor(), args, train_dataset=rows, processing_class=tiny.tiny_tokenizer())
