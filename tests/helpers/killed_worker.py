"""A run that saves after every step, and goes on from its newest complete checkpoint; to be killed at any moment."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import tiny
from trl_ext.runs.checkpoints import numbered


STEPS = 30
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS, "optim": "adamw_torch"}


def trainer_of(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind == "dpo":
        return dpo_runs.dpo_trainer(folder, use_cpu=True, **SAVES)
    options = SAVES | {"num_mini_batches": 2, "normalize_rewards": True, "kl_controller": "band"}
    return ppo_runs.ppo_trainer(folder, {"train_dataset": tiny.tiny_prompts(8)}, use_cpu=True, **options)


class SaysWhere(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"after step {state.global_step}", flush=True)


def run(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end."""
    trainer = trainer_of(kind, folder)
    trainer.add_callback(SaysWhere())
    trainer.train(resume_from_checkpoint=bool(folder.is_dir() and numbered(folder)))
    return ppo_runs.snapshot(trainer.model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(run(sys.argv[1], Path(sys.argv[2])), Path(sys.argv[2]) / "weights.pt")
