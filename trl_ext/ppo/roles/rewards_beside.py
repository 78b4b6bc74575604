"""Ask reward functions in a thread, while reference and critic score the same responses."""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..._trl import is_async_callable
from .reward_calls import CALLED, Logged, noted, start_thread


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

    def asking(self, sources: Sequence[Any]) -> list[Callable]:
        """Return what stands in for all sources in a call of GRPO's that tells the arguments; it scores nothing."""
        return [functools.partial(self._take_inputs, i) for i in range(len(sources))]

    def answering(self, sources: Sequence[Any]) -> list[Any]:
        """Return the sources, the functions with stand-ins that wait for their answers."""
        return [functools.partial(self._answer, i) if i in self._functions else each for i, each in enumerate(sources)]

    def start(self) -> None:
        """Ask all functions."""
        in_thread: list[tuple[Callable[[], Any], Future[Any]]] = []
        for i, function in self._functions.items():
            ask = functools.partial(function, **self._inputs[i])
            if is_async_callable(function):
                assert self._loop is not None
                self._answers[i] = asyncio.run_coroutine_threadsafe(ask(), self._loop)
            else:
                self._answers[i] = Future()
                in_thread.append((ask, self._answers[i]))
        start_thread(functools.partial(_ask_in_turn, in_thread))

    def log(self) -> None:
        """Log what the functions have logged, those of sync ones first, as GRPO asks them."""
        for i in sorted(self._functions, key=lambda i: is_async_callable(self._functions[i])):
            for function, args, kwargs in self._logged[i]:
                function(*args, **kwargs)

    def _take_inputs(self, i: int, **inputs: Any) -> list[float]:
        if i in self._functions:
            watched = {key: functools.partial(noted, self._logged[i], inputs[key]) for key in CALLED}
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
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)
