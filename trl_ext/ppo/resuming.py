"""
What a checkpoint of PPO holds beside weights, optimizer and random numbers, so that a run goes on as if it had never
stopped: the rollout that is being learned from, the controllers, the moments of the scores, the log's open window.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import logging
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..places import checkpoint_of, write_whole
from ..plain import plain
from ..steps_left import require_steps_left
from . import critic
from .config import PPOConfigX
from .rollout import MicroBatch, Rollout


logger = logging.get_logger(__name__)

# What a rollout and its passes are cut by, and what it holds: a run that goes on has to have the same.
SHARED = (
    *("batch_size", "micro_batch_size", "num_mini_batches", "num_ppo_epochs", "world_size", "seed"),
    *("critic", "kl_placement", "needs_reference"),
)
# What GRPO shows of the last rollout; pictures in prompts are not kept.
SHOWN = ("prompt", "completion", "rewards", "advantages", "extra")
# A model's own files, of which one is in its folder.
WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "adapter_model.safetensors")


def find_checkpoint(checkpoint: str | bool | None, args: PPOConfigX, prompts: Any) -> Path | None:
    """
    The checkpoint to go on from, or `None` for a run that begins.

    Args:
        checkpoint: its folder; `True` for the last one in `args.output_dir`.
        prompts: what the run trains on.

    Raises:
        ValueError: when there is none, one that lacks what PPO needs, one of a run that differs in `SHARED` or in the
            number of prompts, or one that has taken all steps of this run.
    """
    folder = checkpoint_of(checkpoint, args.output_dir)
    if folder is None:
        return None
    absent = _absent(folder, args)
    if absent:
        raise ValueError(
            f"PPO cannot go on from {folder}: it has no {', '.join(absent)}. It was cut off, or was saved with "
            f"`save_only_model`, or not by {args.world_size} processes of PPOTrainerX. Resume from another one, or "
            "start a new run from this one's actor (`model`) and `critic/` (`value_model`)."
        )
    saved, now = torch.load(path_of_state(folder, args), weights_only=True, mmap=True)["shared"], shared(args, prompts)
    others = [name for name in saved if saved[name] != now[name]]
    if others:
        before, here = (", ".join(f"{name}={options[name]}" for name in others) for options in (saved, now))
        raise ValueError(f"The run saved in {folder} had {before}; this one has {here}. It has to be the same.")
    require_steps_left(folder, _known_steps(args))
    return folder


def _known_steps(args: PPOConfigX) -> int:
    """Optimizer steps of the run; 0 or less where epochs set them."""
    if args.total_episodes is None or args.num_total_batches is None:
        return args.max_steps
    return args.num_total_batches * args.optimizer_steps_per_rollout


def _absent(folder: Path, args: PPOConfigX) -> list[str]:
    """What is missing of a checkpoint of this rank."""
    numbers = f"rng_state_{args.process_index}.pth" if args.world_size > 1 else "rng_state.pth"
    files = [path_of_state(folder, args).name, numbers]
    if args.deepspeed_plugin is None:  # which saves its engine
        files.append(SCHEDULER_NAME)
        files += [] if list(folder.glob("optimizer_*")) else [OPTIMIZER_NAME]  # FSDP's is a folder
    absent = [name for name in files if not (folder / name).is_file()]
    held = {path.parent.name for path in folder.glob("**/*") if path.name in WEIGHTS}
    absent += [] if critic.FOLDER in held else [f"{critic.FOLDER}/"]
    return absent + ([] if held - {critic.FOLDER} else ["weights of the actor"])


def path_of_state(checkpoint: str | Path, args: PPOConfigX) -> Path:
    """This rank's file, named like the Trainer's of random numbers."""
    return Path(checkpoint) / (f"ppo_state_{args.process_index}.pt" if args.world_size > 1 else "ppo_state.pt")


def known_length(dataset: Any) -> int | None:
    """Prompts in a dataset; `None` of a stream."""
    return len(dataset) if isinstance(dataset, Dataset) else None


def shared(args: PPOConfigX, prompts: Any) -> dict[str, Any]:
    """What a run and one that goes on from its checkpoint have in common, by name."""
    options = {name: getattr(args, name) for name in SHARED}
    return options | {"full_kl": args.kl_estimator == "full", "prompts": known_length(prompts)}


def save_run(trainer: Any, checkpoint: str | Path) -> None:
    """Writes what `PPOTrainerX._start_run` begins with, as it is now on this rank."""
    is_learning = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    state = {
        "shared": shared(trainer.args, trainer.train_dataset),
        "global_step": trainer.state.global_step,
        "step": trainer._step,
        "passes_over_data": int(trainer.state.epoch),
        "rollout": trainer._rollout.tensors() if is_learning else None,
        "micro_batches": [(m.rows, m.num_tokens, m.share) for m in trainer._micro_batches] if is_learning else [],
        "stop_learning": trainer._stop_learning,
        "left_out_steps": trainer._left_out_steps,
        "metrics": {name: list(map(float, values)) for name, values in trainer._metrics["train"].items()},
        "shown": json.dumps(plain(_shown(trainer), not_finite=float)),
    }
    state |= {name: part.state_dict() for name, part in _parts(trainer).items()}
    write_whole(path_of_state(checkpoint, trainer.args), partial(torch.save, state))


def load_run(trainer: Any, checkpoint: Path) -> None:
    """Takes up what `save_run` wrote on this rank, after `PPOTrainerX._start_run`."""
    state = torch.load(path_of_state(checkpoint, trainer.args), map_location="cpu", weights_only=True)
    state = send_to_device(state, trainer.accelerator.device)
    for name, part in _parts(trainer).items():
        part.load_state_dict(state[name])
    if state["rollout"] is not None:
        trainer._rollout = Rollout(**state["rollout"])
        trainer._micro_batches = [MicroBatch(trainer._rollout, *part) for part in state["micro_batches"]]
    if state["passes_over_data"] and known_length(trainer.train_dataset) is None:
        logger.warning(
            "The prompts are a stream, which the run had begun to read again: it goes on from the stream's beginning, "
            "not from where it was."
        )
    trainer._step, trainer._passes_over_data = state["step"], state["passes_over_data"]
    trainer._stop_learning, trainer._left_out_steps = state["stop_learning"], state["left_out_steps"]
    trainer._reference_is_start = False  # the actor has moved
    trainer._metrics["train"].update(state["metrics"])
    for name, values in json.loads(state["shown"]).items():
        if isinstance(values, list):
            trainer._logs[name].extend(values)
        else:
            for key, column in values.items():
                trainer._logs[name][key].extend(column)


def _parts(trainer: Any) -> dict[str, Any]:
    return {
        "coefficients": trainer._coefficients,
        "reward_moments": trainer._reward_moments,
        "held_out": trainer._held_out,
        "ledger": trainer._ledger,
    }


def _shown(trainer: Any) -> dict[str, Any]:
    """What the process that shows completions keeps of them."""
    if not (trainer.log_completions and trainer.accelerator.is_main_process):
        return {}
    return {name: _lists(trainer._logs[name]) for name in SHOWN}


def _lists(values: Any) -> Any:
    """GRPO's queues, or its dictionaries of queues, as lists."""
    return {key: list(queue) for key, queue in values.items()} if isinstance(values, dict) else list(values)
