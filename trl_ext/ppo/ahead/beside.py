"""Score a rollout with reference and critic while its reward functions are asked in a thread."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._trl import is_async_callable, pad
from ..guards import require_room
from ..roles.reward_calls import CALLED, Logged, noted, start_thread
from ..rollout import Rollout


class RewardsBeside:
    """
    The answers of reward functions to one batch: sync functions are asked one after the other in a thread, async ones
    in GRPO's event loop, with the arguments that GRPO has for them.

    Args:
        functions: those among GRPO's sources that are no models, by their place.
        loop: GRPO's, where there is an async function.

    Attributes:
        waited: seconds that the caller has waited for answers.
    """

    def __init__(self, functions: dict[int, Callable], loop: asyncio.AbstractEventLoop | None):
        self._functions, self._loop = functions, loop
        self._inputs: dict[int, dict[str, Any]] = {}
        self._logged: dict[int, Logged] = {i: [] for i in functions}
        self._answers: dict[int, Future[Any]] = {}
        self.waited = 0.0

    def ask(self, sources: list[Any], calculate: Callable[[], Any]) -> None:
        """
        Ask all functions.

        Args:
            sources: GRPO's list, in which stand-ins take the place of the sources.
            calculate: GRPO's calculation of the rewards, which tells the stand-ins the arguments, and scores nothing.
        """
        sources[:] = [partial(self._take_inputs, i) for i in range(len(sources))]
        calculate()
        in_thread: list[tuple[Callable[[], Any], Future[Any]]] = []
        for i, function in self._functions.items():
            ask = partial(function, **self._inputs[i])
            if is_async_callable(function):
                assert self._loop is not None
                self._answers[i] = asyncio.run_coroutine_threadsafe(ask(), self._loop)
            else:
                self._answers[i] = Future()
                in_thread.append((ask, self._answers[i]))
        start_thread(partial(_ask_in_turn, in_thread))

    def answering(self, sources: Sequence[Any]) -> list[Any]:
        """Return the sources, the functions with stand-ins that wait for their answers."""
        return [partial(self._answer, i) if i in self._functions else each for i, each in enumerate(sources)]

    def cancel(self) -> None:
        """Ask no function that has not begun, and end async ones: the run has failed. What has answered stays."""
        for answer in self._answers.values():
            answer.cancel()

    def log(self) -> None:
        """Log what the functions have logged, those of sync ones first, as GRPO asks them."""
        for i in sorted(self._functions, key=lambda i: is_async_callable(self._functions[i])):
            for function, args, kwargs in self._logged[i]:
                function(*args, **kwargs)

    def _take_inputs(self, i: int, **inputs: Any) -> list[float]:
        if i in self._functions:
            watched = {key: partial(noted, self._logged[i], inputs[key]) for key in CALLED}
            self._inputs[i] = inputs | watched
        return [0.0] * len(inputs["completions"])

    def _answer(self, i: int, **inputs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._answers[i].result()
        finally:
            self.waited += time.perf_counter() - start


def _ask_in_turn(asked: list[tuple[Callable[[], Any], Future[Any]]]) -> None:
    for ask, answer in asked:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)
            return  # as GRPO, which would not ask the others


def score_beside(trainer: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> Rollout:
    """
    Score this rank's responses with critic and reference while their rewards are on their way.

    Args:
        trainer: the `PPOTrainerX` whose models score.
        prompt_ids, completion_ids: of each response.

    Returns:
        The responses in the shapes that GRPO will give their tensors, without their rewards.
    """
    args, device = trainer.args, trainer.accelerator.device
    batch: dict[str, Tensor] = {}
    for name, rows, side in (("prompt", prompt_ids, "left"), ("completion", completion_ids, "right")):
        ids = [torch.tensor(row) for row in rows]
        how: dict[str, Any] = {"padding_side": side, "pad_to_multiple_of": trainer.pad_to_multiple_of}
        padded = pad(ids, padding_value=trainer._tokenizer.pad_token_id, **how)
        mask = pad([torch.ones_like(row) for row in ids], padding_value=0, **how)
        batch |= {f"{name}_ids": padded.to(device), f"{name}_mask": mask.to(device)}
    if trainer.mask_truncated_completions:
        ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
        kept = torch.tensor([row[-1] in ends for row in completion_ids], device=device)
        batch["completion_mask"] = batch["completion_mask"] * kept.unsqueeze(1).int()
    rollout = Rollout.from_grpo(batch, torch.zeros(len(completion_ids), device=device), trainer.eos_token_ids)
    rollout.old_logps = trainer._logps_of_correction
    if args.policy_objective == "mask" and not args.reads_old_policy:
        rollout.old_logps = torch.zeros(rollout.mask.shape, device=device)  # what vLLM gave stands in
    require_room(rollout, args, trainer._tokenizer)
    trainer._score_with_models(rollout)
    return rollout
