"""Ask for rollouts before they are due, and hand them over when they are."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers.trainer_utils import has_length

from .rows import Rows, next_rows, rows_ahead
from .server import ServerQueue


logger = logging.getLogger(__name__)

AFTER_SIGNAL = 10.0  # seconds that a save waits for the server, counted from the signal; torchrun kills after 30


class RolloutsAhead:
    """
    The rollouts that a run has asked its server for, up to the one that is due in `rollout_lag` rollouts.

    Args:
        trainer: the `PPOTrainerX` whose rollouts they are.

    Attributes:
        queue: what is asked for and not learned from.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.queue = ServerQueue(trainer.vllm_generation)
        self._rows: Iterator[Rows] | None = None  # of rollouts that are not asked for yet

    def forget(self) -> None:
        """Drop what an ended run has left in flight, once the server has answered."""
        self.queue.forget()
        self._rows = None

    def start(self) -> None:
        """Read the data from where the Trainer is, behind what is asked for; once in a run."""
        if self._rows is not None:
            return
        trainer, every = self.trainer, self.trainer.batches_of_rollout
        with torch.random.fork_rng(devices=[]):
            loader, step = trainer.get_train_dataloader(), trainer.state.global_step
        of_epoch, of_step = trainer.state.max_steps, trainer.args.gradient_accumulation_steps
        if has_length(loader):
            of_epoch = max(1, math.ceil(len(loader) / of_step))
        skipped = 0 if trainer.args.ignore_data_skip else step % of_epoch * of_step
        rows = rows_ahead(loader, step // of_epoch, skipped, trainer._step % every, every)
        self._rows = islice(rows, len(self.queue), None)

    def take(self, generate: Callable[[], tuple]) -> tuple:
        """Return what `generate` returns, of the rollout that the server was asked for before; log how old it is."""
        trainer, version = self.trainer, self._ask()
        if not len(self.queue):  # rows without an end of their own, which a second reading does not have
            return generate()
        generated, lag = self.queue.take(version, generate)
        metrics = trainer._metrics["train"]
        metrics["sampling/rollout_lag"].append(float(lag))
        if trainer.accelerator.is_main_process:
            for name, seconds in self.queue.pop_seconds().items():
                metrics[f"time/{name}"].append(seconds)
        return generated

    def settle(self) -> None:
        """Wait until the server has answered; after a signal so long that there is time left for a save."""
        self.queue.settle(lambda: self.trainer.age_of_signal >= AFTER_SIGNAL)

    def state_dict(self) -> str:
        """
        Return as JSON what is asked for and answered. What is not is asked for again by the run that is resumed, with
        the weights that it has then.
        """
        self.settle()
        trainer, asked = self.trainer, len(self.queue)
        mine = torch.tensor([self.queue.answered()], device=trainer.accelerator.device)
        answered = int(trainer.accelerator.gather(mine).max())  # only the main process has answers
        if answered < asked and trainer.accelerator.is_main_process:
            signalled = f"the {AFTER_SIGNAL:g} s that a save waits after a signal were over"
            logger.warning(
                "Of %d rollouts that vLLM was asked for ahead, %d cannot be saved: %s. A run that is resumed asks for "
                "them again, with the weights that it has then.",
                *(asked, asked - answered, signalled if self.queue.is_generating else "the server has failed"),
            )
        return self.queue.state_dict(answered)

    def load_state_dict(self, state: str) -> None:
        self.queue.load_state_dict(state)

    def _ask(self) -> int:
        """
        Send the server its weights, once it generates nothing, and ask for the rollouts to come. Return the version of
        these weights: how many rollouts were learned from before.
        """
        trainer, args = self.trainer, self.trainer.args
        version = trainer._step // trainer.batches_of_rollout
        left = math.ceil(trainer.state.max_steps / args.optimizer_steps_per_rollout) - version
        self.queue.wait()
        if trainer._last_loaded_step != trainer.state.global_step:
            trainer.vllm_generation.sync_weights()
            trainer._last_loaded_step = trainer.state.global_step
        while len(self.queue) < min(args.rollout_lag + 1, left):
            assert self._rows is not None
            rows = next_rows(self._rows)
            if rows is None:
                break
            ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in trainer.with_prompts(rows)])
            how = {"images": None, "num_generations": trainer.num_generations}
            self.queue.ask(version, partial(trainer.vllm_generation.generate, ids, **how))
        return version


def check_ahead(lag: int, dataset: Any, workers: int, **takes_part: Any) -> None:
    """
    Raise `ValueError` for a `rollout_lag` beside what samples in a dialogue, by the trainer's arguments, or with a
    stream that workers read in another order than one process does.
    """
    if not lag:
        return
    refused = [name for name, value in takes_part.items() if value]
    if refused:
        raise ValueError(
            f"`rollout_lag={lag}` asks the server for whole rollouts ahead, and `{refused[0]}` takes part while one "
            "is sampled. Leave `rollout_lag` at 0."
        )
    shards = getattr(dataset, "num_shards", 1)
    if workers > 1 and shards > 1 and not has_length(dataset):
        raise ValueError(
            f"`rollout_lag={lag}` reads `train_dataset` twice, and {workers} workers read a stream of {shards} shards "
            "in another order than one process. Set `dataloader_num_workers` to 1 or 0, or `rollout_lag` to 0."
        )
