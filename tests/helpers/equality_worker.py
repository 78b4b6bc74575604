"""Ten optimizer steps on given responses and pairs, and what they measure: `run` here, `measure` in two processes."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

import layouts as given
import zero_runs


# The optimizer, the clipping and the files are those of a real run.
SETTINGS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "use_cpu": False,
}
PPO = {"response_length": 9, "kl_coef": 0.2, "old_kl_coef": 0.1, "total_episodes": 40, "num_ppo_epochs": 2}
DPO = {"max_steps": 10, "train_sampling_strategy": "sequential"}
CASES = {
    "ppo, model": PPO
    | {
        "critic_learning_rate": 3e-3,
        "critic_weight_decay": 0.1,
        "critic_lr_scheduler_type": "cosine",
        "positive_nll_coef": 0.3,
        "positive_min_score": 0.0,
    },
    "ppo, model, stop": PPO
    | {
        "target_kl": 1e-3,
        "num_ppo_epochs": 5,
        "total_episodes": 16,
        "cliprange": 0.02,
        "cliprange_high": 0.04,
        "dual_clip": 1.05,
        "lam_alpha": 0.5,
        "critic_lam": 1.0,
    },
    "ppo, head": PPO | {"critic": "head", "critic_stop_gradient": True, "critic_steps": 2, "critic_gate": True},
    "ppo, head, full": PPO | {"critic": "head", "kl_estimator": "full"},
    "ppo, model, tokens": PPO
    | {
        "num_generations": 2,
        "micro_batch_tokens": 24,
        "score_batch_tokens": 32,
        "critic_steps": 2,
        "freeze_critic": ["*self_attn*"],
        "policy_objective": "mask",
        "cliprange": 0.02,
    },
    "dpo": DPO,
}
PADDED = {"packing": False, "micro_batch_tokens": None, "score_batch_tokens": None}
LAYOUTS = {"ddp": None, "zero2": "zero2", "zero3": "zero3"}

# Log lines but times. Of DPO: not what is a mean over micro-batches, and not the correlation of margins and lengths,
# which at the first step is one of margins that are 0 but for rounding.
PPO_LINES = ("loss", "grad_norm", "terms/", "policy/", "value/", "kl/", "reward/", "advantage/", "coef/")
DPO_LINES = ("loss", "grad_norm", "preference/accuracy", "rewards/margins", "kl/")


def run(case: str, folder: Path, deepspeed: str | None, per_process: int, **others: Any) -> dict[str, Any]:
    """
    Trains on batches of `per_process` responses or pairs per process, with `others` among its options. Returns log
    lines and the weights at last.
    """
    algorithm, options = case.split(",")[0], SETTINGS | CASES[case] | others
    options |= {"per_device_train_batch_size": per_process, "gradient_accumulation_steps": 1}
    if deepspeed is not None:
        options["deepspeed"] = f"configs/deepspeed/{deepspeed}.json"
    with zero_runs.launched({"ACCELERATE_USE_DEEPSPEED": "true"} if deepspeed else {}):
        trainer = zero_runs.BUILD[algorithm](folder, folder / "output", models(case, folder), **options)
        if "head" in case:  # 0 at the start; then the trunk would have no part in the value
            torch.manual_seed(0)
            nn.init.normal_(trainer.critic.score.weight, std=0.5)
        trainer.train()
        kept = PPO_LINES if algorithm == "ppo" else DPO_LINES
        lines = [line for line in trainer.state.log_history if "learning_rate" in line]
        return {
            "packs": algorithm == "ppo" and all(packing.on for packing in trainer._packings if packing is not None),
            "lines": [{key: line[key] for key in line if key.startswith(kept)} for line in lines],
            "parameters": zero_runs.full_weights(trainer.model),
            "wrapper": type(trainer.model_wrapped).__name__,
        }


def models(case: str, folder: Path) -> dict[str, Any]:
    """The arguments of the trainer beside actor and reward model."""
    if case == "dpo":
        return {}
    paths = {"ref_model": str(folder / "reference")}
    if "model" in case:
        paths["value_model"] = str(folder / "critic")
    return {"train_dataset": given.PROMPTS, "rollout_func": given.answer} | paths


def measure(folder: Path) -> dict[str, Any]:
    measured = {
        f"{case}, {layout}": run(case, folder, deepspeed, 4) for case in CASES for layout, deepspeed in LAYOUTS.items()
    }
    for layout in ("zero2", "zero3"):
        measured[f"padded, {layout}"] = run("ppo, model, tokens", folder, layout, 4, **PADDED)
    with given.gradient_of_one_share():
        measured["mistake"] = run("ppo, model", folder, "zero3", 4)
    return measured
