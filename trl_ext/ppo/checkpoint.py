"""
The part of a checkpoint beside weights, optimizer and random numbers, with which a run goes on as if it had never
stopped: the rollout that is being learned from, the controllers, the moments of the scores, the log's open window.
"""

import functools
import json
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import logging
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..data.json_values import plain
from ..runs.checkpoints import absent_optimizer, checkpoint_of, require_same_run
from ..runs.folder import write_whole
from ..runs.steps_left import require_steps_left
from .config import PPOConfigX
from .roles import critic


logger = logging.get_logger(__name__)

# Options that decide the size of a rollout, its parts and its tensors: a resumed run must have the same.
SHARED = (
    *("batch_size", "num_generations", "micro_batch_size", "num_mini_batches", "num_ppo_epochs", "world_size", "seed"),
    *("critic", "kl_placement", "needs_reference"),
)
# What is made of options by other names, in words.
MADE_OF = {
    "batch_size": "`per_device_train_batch_size` × `gradient_accumulation_steps` × processes",
    "micro_batch_size": (
        "`per_device_train_batch_size` × processes, or less where it does not divide a mini-batch; with "
        "`micro_batch_tokens` the whole mini-batch, so that this may be changed, but not set or unset"
    ),
    "needs_reference": "whether `kl_coef` is above 0",
}
# Options that the optimizer's saved groups hold, or that decide which groups it has.
OF_THE_OPTIMIZER = (
    *("optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("critic_learning_rate", "critic_weight_decay", "critic_lr_scheduler_type", "freeze_critic"),
)
# Options that have shaped a rollout's tensors: a run that is resumed within a rollout must have the same.
PENDING = (
    *("temperature", "response_length", "stop_token", "stop_token_id", "chat_template_kwargs"),
    *("mask_truncated_completions", "bf16", "fp16", "cast_lm_head_to_fp32"),
    *("reward_weights", "missing_eos_penalty", "normalize_rewards", "reward_clip", "whiten_rewards"),
    *("policy_objective", "positive_nll_coef", "positive_min_score"),
    *("gamma", "lam", "lam_alpha", "critic_lam", "critic_gate", "advantage_estimator", "whiten_advantages"),
    *("use_vllm", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode"),
    *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"),
)
CHECKSUM = "checksum of the prompts"
# GRPO's tables of the last rollout; pictures in prompts are not kept.
SHOWN = ("prompt", "completion", "rewards", "advantages", "extra")
# A model's folder has one of these files.
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "adapter_model.safetensors")


def find_checkpoint(checkpoint: str | bool | None, args: PPOConfigX, prompts: Any) -> Path | None:
    """
    Return the folder of the checkpoint to resume from, or `None` for a new run.

    Args:
        checkpoint: its folder; `True` for the last one in `args.output_dir`.
        prompts: the training dataset.

    Raises:
        ValueError: when the checkpoint does not exist or lacks a file, has taken all steps of this run already, or is
            of a run that differs in `SHARED` or `OF_THE_OPTIMIZER`, in its prompts or, if it stopped within a
            rollout, in `PENDING`.
    """
    folder = checkpoint_of(checkpoint, args.output_dir)
    if folder is None:
        return None
    require_same_run(folder, args)
    absent = _absent(folder, args)
    if absent:
        raise ValueError(
            f"PPO cannot resume from {folder}: it has no {', '.join(absent)}. It was cut off, or was saved with "
            f"`save_only_model`, or not by {args.world_size} processes of PPOTrainerX. Resume from another one, or "
            "start a new run from this one's actor (`model`) and `critic/` (`value_model`)."
        )
    state = torch.load(path_of_state(folder, args), weights_only=True, mmap=True)
    _require_same(folder, state["shared"], shared(args, prompts), "It must be the same.")
    advice = (
        "The optimizer in the checkpoint holds it: keep it, or start a new run from the checkpoint's actor (`model`) "
        "and `critic/` (`value_model`)."
    )
    _require_same(folder, state.get("optimizer", {}), of_the_optimizer(args), advice)
    advice = "A rollout is being learned from that was made with it: keep it, or resume between two rollouts."
    _require_same(folder, state["pending"], pending(args), advice)
    steps = args.max_steps  # 0 or less if epochs decide
    if args.total_episodes is not None and args.num_total_batches is not None:
        steps = args.num_total_batches * args.optimizer_steps_per_rollout
    require_steps_left(folder, steps)
    return folder


def _require_same(folder: Path, saved: dict[str, Any], now: dict[str, Any], advice: str) -> None:
    others = [name for name in saved if saved[name] != now[name]]
    if others == [CHECKSUM]:
        raise ValueError(
            f"The run saved in {folder} had other prompts, as many as this one, another order, or other columns "
            f"beside them (a mask of padding, what reward functions read). {advice}"
        )
    if others:
        before, here = (", ".join(f"{name}={options[name]}" for name in others) for options in (saved, now))
        made = "".join(f" `{name}` is {MADE_OF[name]}." for name in others if name in MADE_OF)
        raise ValueError(f"The run saved in {folder} had {before}; this one has {here}. {advice}{made}")


def _absent(folder: Path, args: PPOConfigX) -> list[str]:
    """Return the files that this rank's checkpoint lacks."""
    numbers = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    files = [path_of_state(folder, args).name, numbers]
    absent = [name for name in files if not (folder / name).is_file()]
    absent += absent_optimizer(folder, args.deepspeed_plugin)
    held = {path.parent.name for path in folder.glob("**/*") if path.name in WEIGHTS}
    absent += [] if critic.FOLDER in held else [f"{critic.FOLDER}/"]
    return absent + ([] if held - {critic.FOLDER} else ["weights of the actor"])


def path_of_state(checkpoint: str | Path, args: PPOConfigX) -> Path:
    """Return the path of this rank's file, named like the Trainer's file of random numbers."""
    return Path(checkpoint) / (f"ppo_state_{args.process_index}.pt" if args.world_size > 1 else "ppo_state.pt")


def known_length(dataset: Any) -> int | None:
    """Return the number of prompts in a dataset; `None` for a stream."""
    return len(dataset) if isinstance(dataset, Dataset) else None


def shared(args: PPOConfigX, prompts: Any) -> dict[str, Any]:
    """Return by name what a run and one resumed from its checkpoint must have in common."""
    options = {name: getattr(args, name) for name in SHARED}
    known = {"prompts": known_length(prompts), CHECKSUM: checksum(prompts)}
    return options | {"full_kl": args.kl_estimator == "full"} | known


@functools.lru_cache(maxsize=1)  # every checkpoint of a run has it
def checksum(prompts: Any) -> int | None:
    """
    Return the CRC-32 of a dataset's rows, in their order; `None` for a stream. Every column counts, since reward
    functions get them all. Columns are read as they are stored: no picture is decoded.
    """
    if not isinstance(prompts, Dataset):
        return None
    batches = prompts.select_columns(sorted(prompts.column_names)).with_format("arrow").iter(1000)
    return functools.reduce(lambda found, batch: crc32(repr(batch.to_pydict()).encode(), found), batches, 0)


def of_the_optimizer(args: PPOConfigX) -> dict[str, Any]:
    """Return by name the options that the optimizer's saved groups hold."""
    return {name: plain(getattr(args, name)) for name in OF_THE_OPTIMIZER}


def pending(args: PPOConfigX) -> dict[str, Any]:
    """Return by name the options that have shaped a rollout."""
    options = {name: getattr(args, name) for name in PENDING}
    if args.needs_reference and args.kl_placement == "reward":
        options |= {"kl_estimator": args.kl_estimator or "k1"}
        options |= {"kl_coef": args.kl_coef} if args.kl_controller == "fixed" else {}
    return options


def save_run(trainer: Any, checkpoint: str | Path) -> None:
    """Write this rank's state of the run into a checkpoint."""
    is_learning = trainer.is_amid_rollout
    state = {
        "shared": shared(trainer.args, trainer.train_dataset),
        "optimizer": of_the_optimizer(trainer.args),
        "pending": pending(trainer.args) if is_learning else {},
        "global_step": trainer.state.global_step,
        "step": trainer._step,
        "run": trainer.run_state.state_dict(is_learning, passes_over_data=int(trainer.state.epoch)),
        "metrics": {name: list(map(float, values)) for name, values in trainer._metrics["train"].items()},
        "shown": json.dumps(plain(_shown(trainer), not_finite=float)),
    }
    if trainer._ahead is not None:
        state["ahead"] = trainer._ahead.state_dict()
    write_whole(path_of_state(checkpoint, trainer.args), functools.partial(torch.save, state))


def load_run(trainer: Any, checkpoint: Path) -> None:
    """Load this rank's state, as `save_run` wrote it, into a run that has just started."""
    state = torch.load(path_of_state(checkpoint, trainer.args), map_location="cpu", weights_only=True)
    state = send_to_device(state, trainer.accelerator.device)
    trainer.run_state.load_state_dict(state["run"])
    if trainer.run_state.passes_over_data and known_length(trainer.train_dataset) is None:
        logger.warning(
            "The prompts are a stream, which the run had begun to read again: it goes on from the stream's beginning, "
            "not from its old position."
        )
    if trainer._ahead is not None:
        trainer._ahead.load_state_dict(state.get("ahead", "[]"))
    elif "ahead" in state:
        logger.warning(
            "What was asked of vLLM ahead, with `rollout_lag`, is dropped, and sampled again when it is due."
        )
    trainer._step = state["step"]
    trainer._reference_is_start = False  # the actor has moved
    trainer._metrics["train"].update(state["metrics"])
    for name, values in json.loads(state["shown"]).items():
        if isinstance(values, list):
            trainer._logs[name].extend(values)
        else:
            for key, column in values.items():
                trainer._logs[name][key].extend(column)


def _shown(trainer: Any) -> dict[str, Any]:
    """Return GRPO's queues of shown completions, or its dictionaries of queues, as lists."""
    if not (trainer.log_completions and trainer.accelerator.is_main_process):
        return {}
    logs = {name: trainer._logs[name] for name in SHOWN}
    return {
        name: {key: list(queue) for key, queue in log.items()} if isinstance(log, dict) else list(log)
        for name, log in logs.items()
    }
