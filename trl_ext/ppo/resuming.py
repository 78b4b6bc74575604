"""
What a checkpoint of PPO holds beside weights, optimizer and random numbers, so that a run goes on as if it had never
stopped: the rollout that is being learned from, the controllers, the moments of the scores, the log's open window.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import logging
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from .config import PPOConfigX
from .rollout import MicroBatch, Rollout


logger = logging.get_logger(__name__)

# What a rollout and its passes are cut by, and what it holds: a run that goes on has to have the same.
SHARED = (
    *("batch_size", "micro_batch_size", "num_mini_batches", "num_ppo_epochs", "world_size", "seed"),
    *("critic", "kl_placement", "kl_estimator"),
)
# What GRPO shows of the last rollout; pictures in prompts are not kept.
SHOWN = ("prompt", "completion", "rewards", "advantages", "extra")


def find_checkpoint(checkpoint: str | bool | None, args: PPOConfigX) -> Path | None:
    """
    The checkpoint to go on from, or `None` for a run that begins.

    Args:
        checkpoint: its folder; `True` for the last one in `args.output_dir`.

    Raises:
        ValueError: when there is none, or one that lacks what PPO needs.
    """
    if not checkpoint:
        return None
    if checkpoint is True:
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if checkpoint is None:
            raise ValueError(f"There is no checkpoint to resume from in {args.output_dir}.")
    folder = Path(checkpoint)
    paths = [folder / TRAINER_STATE_NAME, path_of_state(folder, args)]
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise ValueError(
            f"PPO cannot go on from {folder}: it has no {', '.join(absent)}. It was cut off, or was saved with "
            f"`save_only_model`, or not by {args.world_size} processes of PPOTrainerX. Resume from another one, or "
            "start a new run from this one's actor (`model`) and `critic/` (`value_model`)."
        )
    return folder


def path_of_state(checkpoint: str | Path, args: PPOConfigX) -> Path:
    """This rank's file, named like the Trainer's of random numbers."""
    return Path(checkpoint) / (f"ppo_state_{args.process_index}.pt" if args.world_size > 1 else "ppo_state.pt")


def known_length(dataset: Any) -> int | None:
    """Prompts in a dataset; `None` of a stream."""
    return len(dataset) if isinstance(dataset, Dataset) else None


def save_run(trainer: Any, checkpoint: str | Path) -> None:
    """Writes what `PPOTrainerX._start_run` begins with, as it is now on this rank."""
    is_learning = trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0
    state = {
        "shared": _shared(trainer),
        "step": trainer._step,
        "passes_over_data": int(trainer.state.epoch),
        "rollout": trainer._rollout.tensors() if is_learning else None,
        "micro_batches": [(m.rows, m.num_tokens, m.share) for m in trainer._micro_batches] if is_learning else [],
        "stop_learning": trainer._stop_learning,
        "left_out_steps": trainer._left_out_steps,
        "metrics": {name: list(map(float, values)) for name, values in trainer._metrics["train"].items()},
        "shown": json.dumps({name: _lists(trainer._logs[name]) for name in SHOWN}, default=str),
    }
    state |= {name: part.state_dict() for name, part in _parts(trainer).items()}
    torch.save(state, path_of_state(checkpoint, trainer.args))


def load_run(trainer: Any, checkpoint: Path) -> None:
    """
    Takes up what `save_run` wrote on this rank, after `PPOTrainerX._start_run`.

    Raises:
        ValueError: when the run that wrote it had other options, or prompts, in `SHARED`.
    """
    state = torch.load(path_of_state(checkpoint, trainer.args), map_location="cpu", weights_only=True)
    state = send_to_device(state, trainer.accelerator.device)
    _require_same(state["shared"], _shared(trainer), checkpoint)
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


def _shared(trainer: Any) -> dict[str, Any]:
    return {name: getattr(trainer.args, name) for name in SHARED} | {"prompts": known_length(trainer.train_dataset)}


def _require_same(saved: dict[str, Any], now: dict[str, Any], checkpoint: Path) -> None:
    others = [name for name in saved if saved[name] != now[name]]
    if others:
        before, here = (", ".join(f"{name}={options[name]}" for name in others) for options in (saved, now))
        raise ValueError(f"The run saved in {checkpoint} had {before}; this one has {here}. It has to be the same.")


def _lists(values: Any) -> Any:
    """GRPO's queues, or its dictionaries of queues, as lists."""
    return {key: list(queue) for key, queue in values.items()} if isinstance(values, dict) else list(values)
