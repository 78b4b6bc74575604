"""
Runs that save and go on from their newest complete checkpoint, each in a forked process that may be killed at any
moment. Each line of the standard input begins one: its name in `TABLE` and its folder.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import reward_runs
import tiny
from trl_ext.runs.checkpoints import numbered


STEPS = 8  # two rollouts of PPO
SAVES = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": STEPS, "optim": "adamw_torch"}
# Every pair of critic, controller, what is trained, and where PPO saves: in rollouts, or between them. A critic that
# is an adapter needs an actor that is one.
TABLE = [
    "ppo-model-fixed-whole-within",
    "ppo-model-proportional-lora-between",
    "ppo-model-band-whole-between",
    "ppo-head-fixed-lora-between",
    "ppo-head-proportional-whole-within",
    "ppo-head-band-lora-within",
    "ppo-adapter-fixed-lora-within",
    "ppo-adapter-proportional-lora-between",
    "ppo-adapter-band-lora-between",
    "dpo-whole",
    "dpo-lora",
    "reward-whole",
]
CONTROLLERS = {
    "fixed": {},
    "proportional": {"kl_target": 1e-4, "kl_horizon": 10},
    "band": {"kl_band": [1e-6, 1e-5]},
}
PLACES = {"within": {}, "between": {"save_steps": 4}}


def trainer_of(name: str, folder: Path) -> Any:
    torch.manual_seed(0)
    kind, *words = name.split("-")
    adapter = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")} if "lora" in words else {}
    if kind == "dpo":
        models = adapter | {"ref_model": None} if adapter else {}
        return dpo_runs.dpo_trainer(folder, models, use_cpu=True, **SAVES)
    if kind == "reward":
        return reward_runs.reward_trainer(folder, dpo_runs.tiny_pairs(8), None, **(SAVES | {"learning_rate": 1e-2}))
    critic, controller, _, place = words
    options = SAVES | {"num_mini_batches": 2, "normalize_rewards": True, "critic": critic, "kl_controller": controller}
    models = {"train_dataset": tiny.tiny_prompts(8)} | adapter
    options |= CONTROLLERS[controller] | PLACES[place]
    return ppo_runs.ppo_trainer(folder, models, use_cpu=True, **options)


class SaysWhere(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(f"\nafter {state.global_step}", flush=True)


def run(name: str, folder: Path) -> None:
    trainer = trainer_of(name, folder)
    trainer.add_callback(SaysWhere())
    trainer.train(resume_from_checkpoint=bool(folder.is_dir() and numbered(folder)))


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
