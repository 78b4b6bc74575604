"""The runs that `PPOTrainerX` and TRL 1.12's `PPOTrainer` are compared in; read in both environments."""

from typing import Any

import torch


PAD, END = 0, 2  # of the tiny tokenizer
LENGTH = 6
PROMPTS = [[7], [8, 9, 10], [11, 12], [13, 14, 15, 16, 17], [18, 19, 20], [21, 22, 23, 24], [25, 26], [27, 28, 29]]
MORE = [[*prompt, 9] for prompt in PROMPTS]  # a second batch: TRL 1.12 treats the last one of the data otherwise
HELD_OUT = [[30, 31], [32], [33, 34, 35]]

# As long as the limit, with an end token in the last place: TRL 1.12 has no position after these.
WHOLE = [[30 + i, 41, 35 + i, 50 - i, 44 + i, END] for i in range(8)]
# Cut off, ended in the middle, in the last place, before it, at once.
VARIED = [
    [30, 31, 32, 33, 34, 35],
    [36, 37, END],
    [38, 39, 40, 41, 42, END],
    [END],
    [43, 44, 45, 46, END],
    [47, 48, 49, 50, 51, 52],
    [53, END],
    [54, 55, 56, 57, 58, END],
]

COMMON = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_ppo_epochs": 1,
    "num_mini_batches": 1,
    "response_length": LENGTH,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "vf_coef": 0.1,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "gamma": 0.97,
    "lam": 0.95,
    "total_episodes": 8,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "stop_token": "eos",
    "num_sample_generations": 0,
    "per_device_eval_batch_size": 2,
    "eval_strategy": "no",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
# By name: answers to `PROMPTS` and to `MORE`, or `None` for those that TRL 1.12 samples, and options of both trainers.
CASES = {
    "whole": (WHOLE, {"num_ppo_epochs": 2}),
    "whole, k3, micro-batches": (
        WHOLE,
        {
            "num_ppo_epochs": 2,
            "kl_estimator": "k3",
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
        },
    ),
    "varied": (
        VARIED,
        {"missing_eos_penalty": 1.0, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ),
    "whitened rewards": (VARIED, {"whiten_rewards": True}),
    "schedule": (
        WHOLE,
        {
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "total_episodes": 16,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "max_grad_norm": 1e-3,
        },
    ),
    "cold": (WHOLE, {"temperature": 1e-6}),
    "whitened rewards of four": (VARIED, {"whiten_rewards": True, "per_device_train_batch_size": 4}),
    "pad token": ([[30, 31, PAD, 32, 33, END], *WHOLE[1:]], {}),
    "sampled": (None, {}),
    "sampled with a penalty": (None, {}),
}
EQUAL = ["whole", "whole, k3, micro-batches"]  # in which steps are compared
# Of the actor's generation_config; both trainers sample without top-k and top-p.
PENALTY = {"sampled with a penalty": 3.0}


def whitening_scale(name: str) -> float:
    """Return √(n / (n − 1)): what the advantages here are to TRL 1.12's, whose variance has Bessel's correction."""
    n = sum(map(len, CASES[name][0]))
    return (n / (n - 1)) ** 0.5


def watched_optimizer(actor: Any, value: Any, rates: tuple[float, float]) -> tuple[torch.optim.Optimizer, list[Any]]:
    """Return SGD with a learning rate for each of the models, and a list of what every step of it finds."""
    parameters = {"actor": list(actor.parameters()), "value": list(value.parameters())}
    groups = [{"params": own, "lr": rate} for own, rate in zip(parameters.values(), rates, strict=True)]
    optimizer, steps = torch.optim.SGD(groups), []

    def keep(*_: Any) -> None:
        found = {
            role: [(p.detach().clone(), p.grad.clone()) for p in own if p.grad is not None]
            for role, own in parameters.items()
        }
        steps.append(found | {"rates": [group["lr"] for group in optimizer.param_groups]})

    optimizer.register_step_pre_hook(keep)
    return optimizer, steps
