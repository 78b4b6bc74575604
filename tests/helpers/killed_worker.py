"""
Runs that save after every step and go on from their newest complete checkpoint, each in a forked process that may be
killed at any moment. Each line of the standard input begins one: its kind and its folder.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import tiny
from trl_ext.runs.checkpoints import numbered


STEPS = 8  # two rollouts of PPO
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS, "optim": "adamw_torch"}
WEIGHTS = "weights.pt"  # of a run that has come to its end


def trainer_of(kind: str, folder: Path) -> Any:
    torch.manual_seed(0)
    if kind == "dpo":
        return dpo_runs.dpo_trainer(folder, use_cpu=True, **SAVES)
    options = SAVES | {"num_mini_batches": 2, "normalize_rewards": True, "kl_controller": "band"}
    return ppo_runs.ppo_trainer(folder, {"train_dataset": tiny.tiny_prompts(8)}, use_cpu=True, **options)


class SaysWhere(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"\nafter {state.global_step}", flush=True)


def run(kind: str, folder: Path) -> None:
    trainer = trainer_of(kind, folder)
    trainer.add_callback(SaysWhere())
    trainer.train(resume_from_checkpoint=bool(folder.is_dir() and numbered(folder)))
    torch.save(ppo_runs.snapshot(trainer.model), folder / f"{WEIGHTS}.part")
    os.replace(folder / f"{WEIGHTS}.part", folder / WEIGHTS)  # the kill may come amid this, too


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()  # TRL is imported once
        if not child:
            run(line.split()[0], Path(line.split()[1]))
            os._exit(0)
        print(f"\nbegun {child}", flush=True)
        os.waitpid(child, 0)
        print("\nended", flush=True)
