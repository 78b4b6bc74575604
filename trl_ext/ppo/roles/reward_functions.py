"""Checks of reward functions, when they are given and when they answer."""

import difflib
import functools
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..._trl import is_async_callable
from ...runs.failures import RunError


logger = logging.getLogger(__name__)

# The arguments of every reward function, beside the columns of the dataset.
GIVEN = ("prompts", "completions", "completion_ids", "prompt_ids", "trainer_state", "log_extra", "log_metric")


def checked(function: Callable, name: str) -> Callable:
    """
    Return the reward function with its answers checked, as a function of one finite score for each response, or `None`
    for "does not apply". Errors name it by its `__name__`. What it has paid at single tokens is its `token_rewards`: a
    list for each response, `None` where it gave a score alone.

    Raises:
        ValueError: for a function that does not take the arguments of a reward function.
    """
    check_signature(function, name, dict.fromkeys(GIVEN), complete=False)
    asked: Any

    def scores_of(answer: Any, inputs: dict[str, Any]) -> list[float | None]:
        rewards = check_rewards(answer, asked.__name__, inputs)
        asked.token_rewards = [reward if isinstance(reward, list) else None for reward in rewards]
        return [float(sum(reward)) if isinstance(reward, list) else reward for reward in rewards]

    if is_async_callable(function):

        @functools.wraps(function)
        async def asked(*args, **kwargs):
            check_signature(function, asked.__name__, kwargs)
            with _saying_who_failed(asked.__name__, kwargs):
                answer = await function(*args, **kwargs)
            return scores_of(answer, kwargs)

    else:

        @functools.wraps(function)
        def asked(*args, **kwargs):
            check_signature(function, asked.__name__, kwargs)
            with _saying_who_failed(asked.__name__, kwargs):
                answer = function(*args, **kwargs)
            return scores_of(answer, kwargs)

    asked.__name__ = name  # GRPO logs it under this name
    return asked


@contextmanager
def _saying_who_failed(name: str, inputs: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except RunError:  # after the last of several tries, which it says
        raise
    except Exception as error:
        step = getattr(inputs.get("trainer_state"), "global_step", "?")
        error.add_note(
            f"The reward function {name!r} raised this at step {step}. If what it asks may be away for a while, "
            "`reward_max_retries` asks it again."
        )
        raise


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
    if complete:
        _require_columns(name, signature, inputs)
    try:
        (signature.bind if complete else signature.bind_partial)(**inputs)
    except TypeError as error:
        raise ValueError(
            f"The reward function {name!r} cannot be called as it is declared, {name}{signature}: {error}. Every "
            f"one gets {', '.join(inputs)}{'' if complete else ' and the columns of the dataset'} by name: take "
            f"those that you need and `**kwargs`, as in `def {name.strip('<>')}(completions, **kwargs)`."
        ) from error


def _require_columns(name: str, signature: inspect.Signature, inputs: dict[str, Any]) -> None:
    """Raise `ValueError` for an argument that is neither given nor has a default: it is to be a column."""
    open_ended = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        argument
        for argument, parameter in signature.parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in open_ended and argument not in inputs
    ]
    if missing:
        columns = [column for column in inputs if column not in GIVEN]
        near = difflib.get_close_matches(missing[0], columns, n=1)
        rename = f"Rename one (`--columns {missing[0]}={near[0] if near else 'NAME'}`, in Python `rename_column`)"
        raise ValueError(
            f"The reward function {name!r} cannot be called: it needs {missing[0]!r}, and the dataset has no such "
            f"column; it has {', '.join(columns) or 'none beside the prompt'}. "
            f"{rename if columns else 'Add it to the data'}, or give the argument a default."
        )


def check_rewards(answer: Any, name: str, inputs: dict[str, Any]) -> list[float | list[float] | None]:
    """
    Return what a reward function gives for each response: a score, one reward for each of its tokens, or `None`. A
    score that comes with rewards by token is added to the last of them.

    Raises:
        ValueError: for anything that is not one such reward for each completion.
        FloatingPointError: for NaN and ±inf, with the sample.
    """
    if inspect.iscoroutine(answer):
        answer.close()
    given = as_list(answer)
    if not isinstance(given, list):
        shape = getattr(answer, "shape", None)
        kind = type(answer).__name__
        what = f"a{'n' if kind[0] in 'aeiou' else ''} {kind}" + (
            f" of shape {tuple(shape)}" if shape is not None else f" ({answer!r:.60})"
        )
        raise ValueError(f"The reward function {name!r} returned {'None' if answer is None else what}. {NEEDED}")
    completions = inputs.get("completions")
    if completions is not None and len(given) != len(completions):
        raise ValueError(
            f"The reward function {name!r} returned {len(given)} rewards, but {len(completions)} were expected. "
            f"{NEEDED}"
        )
    rewards = [_reward(reward, row, name, inputs) for row, reward in enumerate(given)]
    for row, reward in enumerate(rewards):
        for token, number in enumerate(reward if isinstance(reward, list) else [reward]):
            if number is not None and not math.isfinite(number):
                step = getattr(inputs.get("trainer_state"), "global_step", "?")
                where = f" at token {token}" if isinstance(reward, list) else ""
                raise FloatingPointError(
                    f"The reward {name!r} is {number}{where} at step {step} for {sample_of(row, inputs)}. Return a "
                    "finite number, or `None` where it does not apply."
                )
    return rewards


NEEDED = (
    "Return a list with one number for each completion, in their order, and `None` where the reward does not apply; "
    "docs/ppo.md has the forms of rewards for single tokens."
)


def _reward(reward: Any, row: int, name: str, inputs: dict[str, Any]) -> float | list[float] | None:
    if reward is None:
        return None
    score, tokens = None, as_list(reward)
    if isinstance(reward, dict):
        if reward.keys() != {"score", "tokens"}:
            raise ValueError(
                f"The reward function {name!r} returned a dictionary of {[*reward]} for completion {row}. {NEEDED}"
            )
        score = _number(reward["score"], name, row, "the score of ")
        tokens = as_list(reward["tokens"])
    if score is None and not isinstance(tokens, list):
        return _number(reward, name, row)
    if not isinstance(tokens, list):
        raise ValueError(
            f"The reward function {name!r} returned {tokens!r:.60}, a {type(tokens).__name__}, for the tokens of "
            f"completion {row}. {NEEDED}"
        )
    length = len(inputs["completion_ids"][row])
    if len(tokens) != length:
        raise ValueError(
            f"The reward function {name!r} returned {len(tokens)} token rewards for a response of {length} tokens: "
            f"{sample_of(row, inputs)}. Return one number for each token of `completion_ids`, a tool's too."
        )
    rewards = [_number(each, name, row, "a token of ") for each in tokens]
    if score is None:
        return rewards
    return [*rewards[:-1], rewards[-1] + score] if rewards else score


def as_list(value: Any) -> Any:
    """Return a list for a tuple, or a tensor or array of one dimension; anything else as it is."""
    if len(getattr(value, "shape", ())) == 1:
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any, name: str, row: int, part: str = "") -> float:
    is_text = getattr(getattr(value, "dtype", None), "kind", "") in ("U", "S", "O")
    if not (isinstance(value, bool | int | float) or (getattr(value, "shape", None) == () and not is_text)):
        raise ValueError(
            f"The reward function {name!r} returned {value!r:.60}, a {type(value).__name__}, for {part}completion "
            f"{row}. {NEEDED}"
        )
    try:
        return float(value.item() if isinstance(value, Tensor) else value)
    except OverflowError:  # an integer beyond every float
        return math.inf if value > 0 else -math.inf


def sample_of(row: int, inputs: dict[str, Any]) -> str:
    """Return how an error names a response, from the arguments of a reward function."""
    prompts, completions = inputs.get("prompts"), inputs.get("completions")
    return f"prompt {prompts[row]!r}, response {completions[row]!r}" if prompts and completions else f"row {row}"


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
