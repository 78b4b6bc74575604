"""Checks of reward functions, when they are given and when they answer."""

import functools
import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..._trl import is_async_callable


logger = logging.getLogger(__name__)

# The arguments of every reward function, beside the columns of the dataset.
GIVEN = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")


def checked(function: Callable, name: str) -> Callable:
    """
    Return the reward function with its answers checked: a list of finite numbers, or `None` for "does not apply".
    Errors name it by its `__name__`.

    Raises:
        ValueError: for a function that does not take the arguments of a reward function.
    """
    check_signature(function, name, dict.fromkeys(GIVEN), complete=False)
    asked: Any
    if is_async_callable(function):

        @functools.wraps(function)
        async def asked(*args, **kwargs):
            check_signature(function, asked.__name__, kwargs)
            return check_scores(await function(*args, **kwargs), asked.__name__, kwargs)

    else:

        @functools.wraps(function)
        def asked(*args, **kwargs):
            check_signature(function, asked.__name__, kwargs)
            return check_scores(function(*args, **kwargs), asked.__name__, kwargs)

    asked.__name__ = name  # GRPO logs it under this name
    return asked


def check_signature(function: Callable, name: str, inputs: dict[str, Any], complete: bool = True) -> None:
    """
    Raise `ValueError` when a function cannot be called with these arguments.

    Args:
        inputs: the arguments by name.
        complete: whether these are all arguments.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function written in C may have no signature
        return
    try:
        (signature.bind if complete else signature.bind_partial)(**inputs)
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called as it is declared, {name}{signature}: {error}. Every "
            f"one gets {', '.join(inputs)}{'' if complete else ' and the columns of the dataset'} by name: take "
            f"those that you need and `**kwargs`, as in `def {name.strip('<>')}(completions, **kwargs)`."
        ) from error


def check_scores(answer: Any, name: str, inputs: dict[str, Any]) -> list[float | None]:
    """
    Return the scores, given as a list, tuple, tensor or array, as a list.

    Raises:
        ValueError: for anything that is not one number or `None` for each completion.
        FloatingPointError: for NaN and ±inf, with the sample.
    """
    if inspect.iscoroutine(answer):
        answer.close()
    shape = getattr(answer, "shape", None)
    if shape is not None and len(shape) == 1:
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        what = f"a {type(answer).__name__}" + (
            f" of shape {tuple(shape)}" if shape is not None else f" ({answer!r:.60})"
        )
        raise ValueError(f"The reward function {name!r} returned {'None' if answer is None else what}. {NEEDED}")
    completions = inputs.get("completions")
    if completions is not None and len(answer) != len(completions):
        raise ValueError(
            f"The reward function {name!r} returned {len(answer)} rewards, but {len(completions)} were expected. "
            f"{NEEDED}"
        )
    scores = [_number(score, row, name) for row, score in enumerate(answer)]
    for row, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            step = getattr(inputs.get("trainer_state"), "global_step", "?")
            prompts, sample = inputs.get("prompts"), f"row {row}"
            if prompts and completions:
                sample = f"prompt {prompts[row]!r}, response {completions[row]!r}"
            raise FloatingPointError(
                f"The reward {name!r} is {score} at step {step} for {sample}. Return a finite "
                "number, or `None` where it does not apply."
            )
    return scores


NEEDED = (
    "Return a list with one number for each completion, in their order, and `None` where the reward does not apply; a "
    "tensor or an array of one dimension will do."
)


def _number(score: Any, row: int, name: str) -> float | None:
    if score is None:
        return None
    is_text = getattr(getattr(score, "dtype", None), "kind", "") in ("U", "S", "O")
    if not (isinstance(score, bool | int | float) or (getattr(score, "shape", None) == () and not is_text)):
        raise ValueError(
            f"The reward function {name!r} returned {score!r:.60}, a {type(score).__name__}, for completion {row}. "
            f"{NEEDED}"
        )
    try:
        return float(score.item() if isinstance(score, Tensor) else score)
    except OverflowError:  # an integer beyond every float
        return math.inf if score > 0 else -math.inf


def named_apart(names: list[str]) -> list[str]:
    """Return the names, with a number at repeated ones, as the log has one reward per name; a warning says so."""
    apart: list[str] = []
    for name in names:
        number, new = 2, name
        while new in apart or (new != name and new in names):
            new, number = f"{name}_{number}", number + 1
        apart.append(new)
    if apart != names:
        logger.warning("Some rewards have the same name; in their order they are logged as %s.", ", ".join(apart))
    return apart
