"""How often, how long and how many at once reward functions are asked, such as those that ask a server."""

import asyncio
import functools
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import torch

from ..._trl import is_async_callable
from ...runs.failures import RunError
from ..options import RewardCallOptions
from .reward_functions import as_list


logger = logging.getLogger(__name__)

# Seconds before a function is asked again: the first time, and at most; each is twice the one before.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
# Arguments that are called, and those that have no value for each response.
CALLED = ("log_extra", "log_metric")
SHARED = ("trainer_state", *CALLED)

Logged = list[tuple[Callable, tuple, dict]]  # calls of them


def patient(function: Callable, name: str, options: RewardCallOptions) -> Callable:
    """
    Return a reward function that asks `function` with the limits of these options: an async one, which GRPO runs
    beside the others. Without a limit it is `function` itself.

    Raises:
        RunError: when called, after the last try.
    """
    timeout, retries, at_once = options.reward_timeout, options.reward_max_retries, options.reward_max_concurrency
    if timeout is None and not retries and at_once is None:
        return function
    ask = function if is_async_callable(function) else functools.partial(_in_thread, function)

    @functools.wraps(function)
    async def asked(**inputs: Any) -> Any:
        step = getattr(inputs.get("trainer_state"), "global_step", "?")
        if at_once is None:
            return _with_log(await _tried(ask, inputs, name, step, timeout, retries))
        gate = asyncio.Semaphore(at_once)

        async def of_one(part: dict[str, Any]) -> tuple[Any, Logged]:
            async with gate:
                given, logged = await _tried(ask, part, name, step, timeout, retries)
            answer = as_list(given)
            if not isinstance(answer, list) or len(answer) != 1:
                raise ValueError(
                    f"With `reward_max_concurrency` the reward function {name!r} is asked for one response at a time, "
                    f"and returned {answer!r:.60}. Return a list with one reward, or leave the option out."
                )
            return answer[0], logged

        tasks = [asyncio.ensure_future(of_one(part)) for part in _one_by_one(inputs)]
        try:
            return [_with_log(each) for each in await asyncio.gather(*tasks)]  # in the order of the responses
        finally:  # nothing is asked for any more once one has failed
            for task in tasks:
                task.cancel()

    return asked


def _one_by_one(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of a call for each response."""
    rows = len(inputs["completions"])
    shared = {name: value for name, value in inputs.items() if name in SHARED}
    by_row = {name: value for name, value in inputs.items() if name not in SHARED}
    return [shared | {name: value[row : row + 1] for name, value in by_row.items()} for row in range(rows)]


async def _tried(
    ask: Callable[..., Awaitable[Any]],
    inputs: dict[str, Any],
    name: str,
    step: Any,
    timeout: float | None,
    retries: int,
) -> tuple[Any, Logged]:
    """Return the answer of the first try that gives one within the time, and what that one is to leave in the log."""
    pause = FIRST_PAUSE
    for number in range(1, retries + 2):
        logged: Logged = []
        watched = {key: functools.partial(noted, logged, inputs[key]) for key in CALLED if key in inputs}
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                answer = await ask(**(inputs | watched))
        except Exception as error:
            said = f"no answer within {timeout:g} s" if limit.expired() else f"{type(error).__name__}: {error}"
            if number > retries:
                raise RunError(_given_up(name, step, number, said)) from error
            logger.warning(
                "The reward function %r has failed at step %s, in try %d of %d: %s. It is asked again in %g s.",
                *(name, step, number, retries + 1, said, pause),
            )
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return answer, logged
    raise AssertionError  # the last try has returned or raised


def _with_log(answered: tuple[Any, Logged]) -> Any:
    answer, logged = answered
    for function, args, kwargs in logged:
        function(*args, **kwargs)
    return answer


def noted(logged: Logged, function: Callable, *args: Any, **kwargs: Any) -> None:
    """Note a call of `log_extra` or `log_metric`, to be made later."""
    logged.append((function, args, kwargs))


def _given_up(name: str, step: Any, tries: int, said: str) -> str:
    tried = "once" if tries == 1 else f"{tries} times in a row"
    return (
        f"The reward function {name!r} has failed {tried} at step {step}, the last time with {said}. See that what it "
        "asks can be reached and answers in time; `reward_timeout` gives it longer, `reward_max_retries` more tries, "
        "`reward_max_concurrency` says how many responses are asked for at once."
    )


def start_thread(run: Callable[[], None]) -> None:
    """Start a thread that ends with the program, on the caller's GPU: by itself a thread takes the first one."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def on_device() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        run()

    threading.Thread(target=on_device, daemon=True).start()


async def _in_thread(function: Callable, **inputs: Any) -> Any:
    """Return what a function returns in a thread of its own, which ends with the program if nobody waits any more."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[Any] = loop.create_future()

    def settle(set_result: Callable[[Any], None], value: Any) -> None:
        if not result.done():  # it may be late
            set_result(value)

    def run() -> None:
        try:
            answer = function(**inputs)
        except BaseException as error:
            outcome = (result.set_exception, error)
        else:
            outcome = (result.set_result, answer)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    start_thread(run)
    return await result
