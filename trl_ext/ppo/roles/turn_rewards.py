"""Environments that pay for the turns of the model, as reward functions that pay at tokens."""

import inspect
from collections.abc import Callable
from typing import Any

from ..._trl import is_async_callable
from .reward_functions import as_list, sample_of


# The method by which an environment pays for the turns of the model.
TURN_REWARDS = "get_turn_rewards"


def turn_sources(environments: Any, tool_mask: Callable[[], list[list[int]] | None]) -> tuple[Any, list[Callable]]:
    """
    Return an `environment_factory` like the given one, and a reward function for each class of environments that it
    makes that has `get_turn_rewards`: a list of rewards, one for each turn of the model, or `None`. A turn is a run of
    tokens that the model wrote, and is paid at its last token.

    Args:
        environments: a factory, factories by name, or `None`.
        tool_mask: gives, for each response, 0 at tokens that a tool wrote and 1 elsewhere; `None`: no tool wrote any.
    """
    named = environments if isinstance(environments, dict) else {None: environments} if environments else {}
    seen = {name: _seen(factory) for name, factory in named.items()}
    kinds = dict.fromkeys(kind for kind, _ in seen.values() if hasattr(kind, TURN_REWARDS))
    factories = {name: factory for name, (_, factory) in seen.items()}
    same = factories if isinstance(environments, dict) else factories.get(None)
    return same, [_turn_source(kind, tool_mask) for kind in kinds]


def _seen(factory: Callable) -> tuple[type, Callable]:
    """Return the class of what a factory makes, and the factory, which begins with the one that was made to see it."""
    if isinstance(factory, type):
        return factory, factory
    first = [factory()]
    return type(first[0]), lambda: first.pop() if first else factory()


def _turn_source(kind: Any, tool_mask: Callable[[], list[list[int]] | None]) -> Callable:
    reads_messages = len(inspect.signature(kind.get_turn_rewards).parameters) > 1  # beside `self`

    def ask(environment: Any, completion: Any) -> Any:
        if type(environment) is not kind:
            return None
        return environment.get_turn_rewards(*[completion] if reads_messages else [])

    def by_token(turns: list[Any], inputs: dict[str, Any]) -> list[list[Any] | None]:
        masks = tool_mask() or [[1] * len(ids) for ids in inputs["completion_ids"]]
        return [
            None if rewards is None else _at_turn_ends(rewards, masks[row], kind.__name__, sample_of(row, inputs))
            for row, rewards in enumerate(turns)
        ]

    source: Any
    if is_async_callable(kind.get_turn_rewards):

        async def source(environments, **inputs):
            asked = [ask(*pair) for pair in zip(environments, inputs["completions"], strict=True)]
            return by_token([None if each is None else await each for each in asked], inputs)

    else:

        def source(environments, **inputs):
            return by_token([ask(*pair) for pair in zip(environments, inputs["completions"], strict=True)], inputs)

    source.__name__ = f"{kind.__name__}_turns"
    return source


def _at_turn_ends(rewards: Any, mask: list[int], name: str, sample: str) -> list[Any]:
    """Return one reward for each token: a turn's at its last token, else 0."""
    ends = [token for token, (here, after) in enumerate(zip(mask, [*mask[1:], 0], strict=True)) if here and not after]
    rewards = as_list(rewards)
    if not isinstance(rewards, list) or len(rewards) != len(ends):
        raise ValueError(
            f"`get_turn_rewards` of the environment {name!r} returned {rewards!r:.200} for a response of {len(ends)} "
            f"turns: {sample}. Return a list with one number for each turn of the model, the last answer among them, "
            "or `None`."
        )
    by_token: list[Any] = [0.0] * len(mask)
    for token, reward in zip(ends, rewards, strict=True):
        by_token[token] = reward
    return by_token
