"""Where scores come from: reward models, on token ids or on text, and Python functions, checked as they answer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .._trl import create_model_from_path, get_config_model_id, is_async_callable


logger = logging.get_logger(__name__)

# Text on which two tokenizers with one vocabulary would still differ: case, accents, digits, spaces, other scripts.
PROBE = "Hello, World!  naïve café\n\t1234.5 don't 长城 <|x|> émile"


class TokenScorer:
    """
    A reward model that reads the actor's token ids: prompt and response as they were sampled.

    The model reads its score at the last id that is not the pad token, as transformers' classifiers do. So where the
    end token is also the pad token it is not read, neither here nor when the model was trained.

    GRPO calls it as a reward function; the ids reach it as `prompt_ids` and `completion_ids`.

    `ask` gives the scores (b,) of `input_ids` and `attention_mask`: the model does, unless it is an adapter on the
    actor's base, which is reached through the actor.
    """

    def __init__(self, model: nn.Module, name: str, pad_token_id: int, batch_size: int):
        self.model = model
        self.ask: Callable[..., Tensor] = self._ask_model
        self.pad_token_id = pad_token_id
        self.batch_size = batch_size
        self.__name__ = name

    def __call__(self, prompt_ids: list[list[int]], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Scores, one per response."""
        sequences = [prompt + completion for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        scores: list[float] = []
        for start in range(0, len(sequences), self.batch_size):
            scores += self._score(sequences[start : start + self.batch_size]).tolist()
        return scores

    @torch.no_grad()
    def _score(self, sequences: list[list[int]]) -> Tensor:
        device = next(self.model.parameters()).device
        rows = [torch.tensor(ids) for ids in sequences]
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return self.ask(input_ids=input_ids.to(device), attention_mask=mask.to(device)).float()

    def _ask_model(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits[:, 0]


def token_scorer(reward_func: Any) -> TokenScorer | None:
    """The [`TokenScorer`] that GRPO calls, or `None` for another kind of reward."""
    return reward_func if isinstance(reward_func, TokenScorer) else None


def check_reward_checkpoint(path: str, trust_remote_code: bool = False) -> None:
    """Raises `ValueError`, from the config alone, for a checkpoint without a trained score of one label."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    architecture = (config.architectures or ["an unknown architecture"])[0]
    if "ForSequenceClassification" not in architecture:
        raise ValueError(
            f"The reward model {path!r} holds a {architecture}, whose score head would be untrained. Train a reward "
            "model first, for example with `trl-ext reward`."
        )
    check_single_label(config.num_labels, path)


def load_reward_model(path: str, init_kwargs: dict[str, Any]) -> PreTrainedModel:
    """Loads a trained reward model; raises `ValueError` for a checkpoint without a trained score of one label."""
    check_reward_checkpoint(path, init_kwargs.get("trust_remote_code", False))
    return create_model_from_path(path, architecture=AutoModelForSequenceClassification, num_labels=1, **init_kwargs)


def check_reward_model(model: PreTrainedModel) -> None:
    """Raises `ValueError` for a reward model in memory that gives more than one score."""
    check_single_label(model.config.num_labels, get_config_model_id(model.config) or type(model).__name__)


def check_single_label(num_labels: int, name: str) -> None:
    if num_labels != 1:
        raise ValueError(
            f"The reward model {name!r} has {num_labels} labels; a response gets one score. Use a model trained with "
            "`num_labels=1`, or wrap it in a function for `reward_funcs`."
        )


def find_tokenizer(path: str | None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the reward model in `path`, or `None`."""
    if not path:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return None


def same_tokenizer(actors: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, actor_vocabulary: int) -> bool:
    """
    Whether two tokenizers turn text into the same ids and ids into the same text. What does not count: ids of the
    actor's tokenizer that the actor does not have, and a pad token that only one of the two has, which is never read
    (scripts for TRL 1.12 add one).
    """
    if actors is other:
        return True
    mine, its = actors.get_vocab().items(), other.get_vocab().items()
    differing = {token for token, _ in its - mine} | {token for token, id_ in mine - its if id_ < actor_vocabulary}
    same_vocabulary = differing <= {actors.pad_token, other.pad_token}
    return same_vocabulary and actors(PROBE)["input_ids"] == other(PROBE)["input_ids"]


def reads_actor_ids(
    reward_model: PreTrainedModel,
    reward_tokenizer: PreTrainedTokenizerBase | None,
    actor_tokenizer: PreTrainedTokenizerBase,
    actor_vocabulary: int,
) -> bool:
    """
    Whether the reward model shares the actor's tokenizer. A model with no tokenizer of its own to be found, made in
    memory as in scripts for TRL 1.12, must have a vocabulary that holds every id of the actor's.

    Args:
        actor_vocabulary: rows of the actor's embedding; it can sample no id beyond.
    """
    vocabulary = reward_model.config.get_text_config().vocab_size
    needed = min(len(actor_tokenizer), actor_vocabulary)
    if reward_tokenizer is not None:
        return vocabulary >= needed and same_tokenizer(actor_tokenizer, reward_tokenizer, actor_vocabulary)
    if vocabulary < needed:
        raise ValueError(
            f"The reward model knows {vocabulary} tokens and the actor's tokenizer {needed}, and no tokenizer is "
            "saved beside the reward model. Pass its tokenizer as `reward_processing_classes`."
        )
    logger.info("No tokenizer is saved beside the reward model: it reads the actor's token ids.")
    return True


def checked(function: Callable, name: str) -> Callable:
    """
    The reward function, refusing NaN and ±inf with its name and the sample. `None` still means "does not apply".
    """
    if is_async_callable(function):

        @functools.wraps(function)
        async def checked_async(*args, **kwargs):
            return _check_scores(await function(*args, **kwargs), name, kwargs)

        checked_async.__name__ = name  # what GRPO logs it under
        return checked_async

    @functools.wraps(function)
    def checked_sync(*args, **kwargs):
        return _check_scores(function(*args, **kwargs), name, kwargs)

    checked_sync.__name__ = name
    return checked_sync


def _check_scores(scores: list[float | None], name: str, inputs: dict[str, Any]) -> list[float | None]:
    for row, score in enumerate(scores):
        if score is not None and not math.isfinite(score):
            prompts, completions = inputs.get("prompts"), inputs.get("completions")
            sample = (
                f"prompt {prompts[row]!r}, response {completions[row]!r}" if prompts and completions else f"row {row}"
            )
            step = getattr(inputs.get("trainer_state"), "global_step", "?")
            raise FloatingPointError(
                f"The reward {name!r} is {score} at step {step} for {sample}. Return a finite number, or `None` where "
                "it does not apply."
            )
    return scores
