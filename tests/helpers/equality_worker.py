"""Ten optimizer steps on given responses and pairs, and what they measure: `run` here, `measure` in two processes."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

import dpo_runs
import layouts as given
import tiny
import zero_runs
from accelerate_files import ACCELERATE, launch


# The optimizer, the clipping and the files are those of a real run.
SETTINGS = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "use_cpu": False,
}
PPO = {"response_length": 9, "kl_coef": 0.2, "old_kl_coef": 0.1, "total_episodes": 40, "num_ppo_epochs": 2}
PAIRS = {"max_steps": 10, "train_sampling_strategy": "sequential"}
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
    "ppo, window": PPO,
    "ppo, plain": PPO | {"critic_learning_rate": 3e-3},
    "ppo, plain, tokens": PPO | {"num_generations": 2, "micro_batch_tokens": 24, "score_batch_tokens": 32},
    "ppo, plain, LoRA": PPO,
    "dpo": PAIRS,
    "reward": PAIRS,
    "dpo, LoRA": PAIRS,
    "reward, LoRA": PAIRS,
}
PADDED = {"packing": False, "micro_batch_tokens": None, "score_batch_tokens": None}
WITHOUT_FSDP = ("ddp", "zero2", "zero3")
LAYOUTS_OF = {
    **dict.fromkeys(("ppo, model", "ppo, model, stop", "ppo, head", "ppo, model, tokens"), WITHOUT_FSDP),
    **dict.fromkeys(("ppo, head, full", "dpo"), (*WITHOUT_FSDP, "fsdp2")),
    "ppo, window": ("zero3",),  # where the ranks wait for each other in every pass
    **dict.fromkeys(("ppo, plain", "ppo, plain, tokens", "ppo, plain, LoRA"), ("fsdp2",)),
    **dict.fromkeys(("reward", "dpo, LoRA", "reward, LoRA"), ("fsdp2",)),
}
RUNS = [(case, layout) for case in CASES for layout in LAYOUTS_OF[case]]

# Log lines but times. Of DPO: not what is a mean over micro-batches, and not the correlation of margins and lengths,
# which at the first step is one of margins that are 0 but for rounding.
PPO_LINES = ("loss", "grad_norm", "terms/", "policy/", "value/", "kl/", "reward/", "advantage/", "coef/")
LINES = {
    "ppo": PPO_LINES,
    "dpo": ("loss", "grad_norm", "preference/accuracy", "rewards/margins", "kl/"),
    "reward": ("loss", "grad_norm", "accuracy", "margin"),
}


def save(folder: Path) -> None:
    """The models that the runs load; one has a window that the longest of the given sequences is one token beyond."""
    zero_runs.save(folder)
    tokenizer = tiny.tiny_tokenizer()
    prompts = [len(tokenizer(prompt)["input_ids"]) for prompt in given.PROMPTS["prompt"]]
    longest = max(n + len(answer) for n, answer in zip(prompts, given.ENV_MASKS, strict=True))
    model = dpo_runs.tiny_model("mistral_short_window", sliding_window=longest - 1)
    model.save_pretrained(folder / "window")
    tokenizer.save_pretrained(folder / "window")


def run(case: str, folder: Path, layout: str | None, per_process: int, **others: Any) -> dict[str, Any]:
    """
    Trains on batches of `per_process` responses or pairs per process, with `others` among its options. Returns log
    lines and the weights at last.
    """
    algorithm, options = case.split(",")[0], SETTINGS | CASES[case] | others
    options |= {"per_device_train_batch_size": per_process, "gradient_accumulation_steps": 1}
    environment = {}
    if layout == "fsdp2":
        environment = launch(ACCELERATE / "fsdp2.yaml", "--num_processes", "2").environment
    elif layout in ("zero2", "zero3"):
        environment = {"ACCELERATE_USE_DEEPSPEED": "true"}
        options["deepspeed"] = f"configs/deepspeed/{layout}.json"
    with zero_runs.launched(environment):
        trainer = zero_runs.BUILD[algorithm](folder, folder / "output", models(case, folder), **options)
        if "head" in case:  # 0 at the start; then the trunk would have no part in the value
            torch.manual_seed(0)
            nn.init.normal_(trainer.critic.score.weight, std=0.5)
        trainer.train()
        kept = LINES[algorithm]
        lines = [line for line in trainer.state.log_history if "learning_rate" in line]
        return {
            "packs": algorithm == "ppo" and all(packing.on for packing in trainer._packings if packing is not None),
            "lines": [{key: line[key] for key in line if key.startswith(kept)} for line in lines],
            "parameters": zero_runs.full_weights(trainer.model),
            "wrapper": type(trainer.model_wrapped).__name__,
        }


def models(case: str, folder: Path) -> dict[str, Any]:
    """The arguments of the trainer beside actor and reward model."""
    algorithm = case.split(",")[0]
    arguments: dict[str, Any] = {}
    if "LoRA" in case:
        task = "SEQ_CLS" if algorithm == "reward" else "CAUSAL_LM"
        arguments["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task)
    if algorithm != "ppo":
        return arguments
    if "LoRA" not in case:  # there the reference is the actor without its adapter
        arguments["ref_model"] = str(folder / "reference")
    if "window" in case:  # in each rollout one rank packs its rows and the other pads them
        arguments["model"] = str(folder / "window")
    if "head" not in case:
        arguments["value_model"] = str(folder / "critic")
    return {"train_dataset": given.PROMPTS, "rollout_func": given.answer} | arguments


def measure(folder: Path) -> dict[str, Any]:
    measured = {f"{case}, {layout}": run(case, folder, layout, 4) for case, layout in RUNS}
    for layout in ("zero2", "zero3"):
        measured[f"padded, {layout}"] = run("ppo, model, tokens", folder, layout, 4, **PADDED)
    with given.gradient_of_one_share():
        measured["mistake"] = run("ppo, model", folder, "zero3", 4)
    return measured
