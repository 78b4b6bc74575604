"""
A run of PPO in two processes under each of several layouts (as in `layout_worker`), and the same run resumed from its
first step of six. The first rollout gives four, in two passes: the resumed run is within one, and begins another.
"""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainerCallback

import dpo_runs
import zero_runs


OPTIONS = {
    "max_steps": 6,
    "num_mini_batches": 2,
    "save_strategy": "no",
    "normalize_rewards": True,
    "positive_nll_coef": 0.3,
    "positive_min_score": 0.0,
    "lam_alpha": 0.5,
    "critic_lam": 1.0,
    "critic_gate": True,
    "optim": "adamw_torch",
}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


class SavesOnce(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step == 1


def trainer_of(folder: Path, output: Path, layout: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    models = {"peft_config": LoraConfig(**LORA)} if layout.get("adapter") else {}
    return zero_runs.ppo(folder, output, models, **(OPTIONS | layout["options"]))


def results(trainer: Any) -> dict[str, Any]:
    """What the last three steps logged, and the weights after them."""
    lines = [line for line in trainer.state.log_history if "loss" in line and line["step"] > 3]
    keys = ("loss", "grad_norm", "reward/score", "kl/ref", "policy/ratio_mean", "learning_rate", "epoch")
    keys += ("terms/positive_nll", "value/gate", "grad_norm/actor", "grad_norm/critic")
    return {
        "lines": [{key: line[key] for key in keys if key in line} for line in lines],
        "weights": zero_runs.full_weights(trainer.model),
    }


def run(folder: Path, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    output = folder / name
    measured = {}
    for part, checkpoint in (("whole", None), ("resumed", str(output / "checkpoint-1"))):
        with zero_runs.launched(layout["environment"]):
            trainer = trainer_of(folder, output, layout)
            trainer.add_callback(SavesOnce())
            trainer.train(resume_from_checkpoint=checkpoint)
            measured[part] = results(trainer) | {"wrapper": type(trainer.model_wrapped).__name__}
            del trainer
    return measured


BY_TWO = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
BY_ONE = BY_TWO | {"gradient_accumulation_steps": 2}  # as many pairs in an optimizer step


def by_two(folder: Path, checkpoint: str) -> dict[str, Any]:
    """The weights of DPO in two processes: of a whole run, and resumed from what one process has saved."""
    weights = {}
    for part, from_where in (("whole", None), ("resumed", checkpoint)):
        trainer = dpo_runs.dpo_trainer(folder / f"two {part}", **BY_TWO)
        trainer.train(resume_from_checkpoint=from_where)
        weights[part] = zero_runs.full_weights(trainer.model)
    return weights


def measure(folder: Path, layouts: dict[str, Any]) -> dict[str, Any]:
    return {name: run(folder, name, layout) for name, layout in layouts.items()}
