"""Prompts: the columns in which a dataset may have them, and their checks before any model is loaded."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import has_length
from transformers.utils import logging
from trl import is_conversational

from ..data.conversions import ANSWERS
from ..data.formats import (
    CONVERSATION,
    LOOKED_AT,
    SHAREGPT,
    TEXT,
    describe,
    require,
    require_chat_template,
    warn_of_unread,
)
from ..data.rendering import check_written_prompts
from ..models.loading import check_known
from ..runs.requirements import require_full_batch
from .config import PPOConfigX


logger = logging.get_logger(__name__)

READ = ("input_ids", "attention_mask")  # the columns of a tokenised prompt
NO_IDS_TO_COLLATE = (
    "`data_collator` collates tokenised prompts, and {name} has no column `input_ids` but {columns}. Remove the "
    "collator: the trainer tokenises and pads `prompt` itself."
)


OF_EACH_ROW = (
    "Where they are the same for all rows, give them there and remove the column; else write the prompts out, "
    "`tokenizer.apply_chat_template(row['prompt'], tokenize=False, add_generation_prompt=True, ...)`, as text. A "
    "column for a reward function takes another name."
)


class TokenisedPrompt(str):
    """
    The text of a prompt that was given as token ids (TRL 1.12's `input_ids`), with those ids, which the actor reads.
    """

    input_ids: list[int]

    def __new__(cls, text: str, input_ids: list[int]) -> "TokenisedPrompt":
        prompt = super().__new__(cls, text)
        prompt.input_ids = input_ids
        return prompt

    def __reduce__(self) -> tuple[type, tuple[str, list[int]]]:
        """Return class and arguments, for copies and for pickling."""
        return type(self), (str(self), self.input_ids)


def is_tokenised(row: dict[str, Any]) -> bool:
    """Return whether the row has its prompt as token ids."""
    return "input_ids" in row


def with_tokenised_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, data_collator: Callable | None, pad_id: int | None
) -> list[dict[str, Any]]:
    """
    Return rows with a [`TokenisedPrompt`] under "prompt", without padding, in place of `input_ids`. A data collator
    sees the rows first, as in TRL 1.12.
    """
    collated: Sequence[Mapping[str, Any]] = rows
    if data_collator is not None:
        batch = {
            name: torch.as_tensor(column).tolist() for name, column in data_collator(rows).items() if name in READ
        }
        if "attention_mask" not in rows[0] and "attention_mask" in batch:
            # The collator's mask leaves out the collator's padding, not the padding that a row had before.
            masks = batch.pop("attention_mask")
            batch["input_ids"] = [_kept(*pair) for pair in zip(batch["input_ids"], masks, strict=True)]
        collated = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    all_ids = [unpadded(row, pad_id, tokenizer.eos_token_id) for row in collated]
    texts = tokenizer.batch_decode(all_ids, skip_special_tokens=True)
    prompts = [TokenisedPrompt(text, ids) for text, ids in zip(texts, all_ids, strict=True)]
    return [
        {name: value for name, value in row.items() if name not in READ} | {"prompt": prompt}
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def unpadded(row: Mapping[str, Any], pad_id: int | None, eos_id: int | None) -> list[int]:
    """
    Return a row's `input_ids` without padding, on either side: without what its `attention_mask` leaves out or, if it
    has none, without the pad token, as in TRL 1.12.

    If the end token is the pad token too, or stands in for one, it counts as padding at both ends of a row only, since
    it also ends the turns of a conversation; a warning says so once.
    """
    ids = [int(id_) for id_ in row["input_ids"]]  # a list, tensor or array
    if row.get("attention_mask") is not None:
        return _kept(ids, row["attention_mask"])
    pad_id = eos_id if pad_id is None else pad_id
    if pad_id not in ids:
        return ids
    if pad_id != eos_id:
        return [id_ for id_ in ids if id_ != pad_id]
    first = next((i for i, id_ in enumerate(ids) if id_ != pad_id), len(ids))
    last = next((i for i in range(len(ids), 0, -1) if ids[i - 1] != pad_id), 0)
    if last - first < len(ids):
        logger.warning_once(
            "Prompts in `input_ids` begin or end with the end token, and the tokenizer has no other pad token: it is "
            "taken for padding. Give a column `attention_mask` if it belongs to the prompts."
        )
    return ids[first:last]


def _kept(ids: Sequence[int], mask: Sequence[int]) -> list[int]:
    if len(mask) != len(ids):
        raise ValueError(
            f"A prompt has {len(ids)} tokens in `input_ids` and {len(mask)} in `attention_mask`; give one for each."
        )
    return [id_ for id_, is_kept in zip(ids, mask, strict=True) if is_kept]


class WholeStream(torch.utils.data.IterableDataset):
    """
    A stream that every process reads whole, so that all take their rows from the same batches, and that counts its
    rows, since accelerate fills up the last batch. It would give each process shards of a stream with many of them:
    other prompts than its part of the rollout's, and more batches on one process than on another.

    Attributes:
        num_rows: those of the last reading.
    """

    def __init__(self, stream: IterableDataset):
        self.stream, self.num_rows = stream, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.num_rows = 0
        for row in self.stream:
            self.num_rows += 1
            yield row

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)


def rows_of(dataset: Any, args: PPOConfigX) -> int | None:
    """
    Return how many responses an evaluation counts, after it: those to every prompt of the dataset in a dataloader.
    `None` for a stream of another kind.
    """
    stream = getattr(dataset, "dataset", dataset)  # where accelerate takes a process's share of it
    if isinstance(stream, WholeStream):
        return stream.num_rows
    return len(dataset) * args.num_generations_eval if has_length(dataset) else None


def check_datasets(
    train_dataset: Any,
    eval_dataset: Any,
    collator: Callable | None,
    tokenizer: Any,
    context: int | None,
    args: PPOConfigX,
    pad_id: int | None = None,
    known: int | None = None,
    reads_columns: bool = True,
) -> None:
    """
    Check the prompts of every map-style dataset, and the columns of a stream's first row.

    Args:
        known: number of tokens that the actor has an embedding of.
        reads_columns: whether something, such as a reward function, may read columns beside the prompts.
    """
    if train_dataset is None:
        raise ValueError("There are no prompts: pass `train_dataset` with a column `prompt` or `input_ids`.")
    if not isinstance(train_dataset, Dataset):
        check_budgets(args)
    for name, dataset in named(train_dataset, eval_dataset).items():
        if isinstance(dataset, Dataset | IterableDataset):
            if next(iter(dataset), None) is None:
                raise ValueError(f"`{name}` has no rows; PPO needs prompts.")
            check_columns(dataset, name, tokenizer)
            if not reads_columns:
                warn_of_unread(dataset, "prompts", name)
            ids_of = partial(unpadded, pad_id=pad_id, eos_id=getattr(tokenizer, "eos_token_id", None))
            check_written_prompts(dataset, name, tokenizer, args.chat_template_kwargs, ids_of)
        if not isinstance(dataset, Dataset):
            continue
        if name != "train_dataset":
            n = args.num_generations_eval
            answered = f"`{name}`, each prompt {n} times," if n > 1 else f"`{name}`"
            require_full_batch(len(dataset) * n, answered, args)
        if collator is not None and "input_ids" not in dataset.column_names:
            raise ValueError(NO_IDS_TO_COLLATE.format(name=f"`{name}`", columns=dataset.column_names))
        options = (args.response_length, args.dataset_num_proc, args.chat_template_kwargs)
        limits = {"the model's context": context}
        if name == "train_dataset":
            limits["`micro_batch_tokens`"] = args.micro_batch_tokens
        if name == "train_dataset" or args.needs_reference:  # no other pass reads held-out responses
            limits["`score_batch_tokens`"] = args.score_batch_tokens
        check_prompts(dataset, name, tokenizer, limits, *options, pad_id=pad_id, known=known)
    if isinstance(train_dataset, Dataset) and len(train_dataset) < args.num_prompts:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} prompts, and a rollout takes {args.num_prompts}: "
            "`per_device_train_batch_size` × `gradient_accumulation_steps` × processes / `num_generations`. Add "
            f"prompts, or {_smaller_rollout(len(train_dataset), args)}."
        )


def _smaller_rollout(prompts: int, args: PPOConfigX) -> str:
    """Return what to set for a rollout of at most so many prompts."""
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    whole = args.num_mini_batches * args.num_generations  # what divides the responses of a rank
    for name, size in (("per_device_train_batch_size", batch), ("gradient_accumulation_steps", steps)):
        others = batch * steps // size
        fitting = [n for n in range(1, size) if n * args.num_prompts <= prompts * size and n * others % whole == 0]
        if fitting:
            return f"set `{name}={fitting[-1]}`"
    return "lower one of them"


def named(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """Return a run's datasets by the names that errors use."""
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    datasets = {"train_dataset": train_dataset}
    return datasets | {f"eval_dataset{f'[{key!r}]' if key else ''}": dataset for key, dataset in held_out.items()}


def check_budgets(args: PPOConfigX) -> None:
    """Raise `ValueError` for budgets of tokens that no prompt fits with its response; for prompts not known yet."""
    budgets = {name: getattr(args, name) for name in ("micro_batch_tokens", "score_batch_tokens")}
    small = [name for name, budget in budgets.items() if budget is not None and budget <= args.response_length]
    if small:
        given = " and ".join(f"`{name}={budgets[name]}`" for name in small)
        raise ValueError(
            f"A pass of {given} tokens has no room for a prompt and a response of `response_length="
            f"{args.response_length}`. Set at least {args.response_length} and the tokens of your longest prompt, or "
            "lower `response_length`."
        )


def check_prompts(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    limits: Mapping[str, int | None],
    response_length: int,
    num_proc: int | None = None,
    template_kwargs: dict[str, Any] | None = None,
    pad_id: int | None = None,
    known: int | None = None,
) -> None:
    """
    Raise `ValueError` unless every prompt is of tokens that the actor knows and fits the limits with its response.

    Args:
        dataset: a map-style dataset with `prompt` (text or conversation) or `input_ids` (a list of token ids).
        name: of the dataset, for the error.
        limits: tokens that a prompt and its response may have, by what sets them: a model's context, or an option
            for a budget of tokens, in backticks. `None` for no limit.
        pad_id: the pad token of prompts in `input_ids`.
        known: number of tokens that the actor has an embedding of.
    """

    def length(row: dict[str, Any]) -> dict[str, int]:
        ids = prompt_ids(row, tokenizer, template_kwargs or {}, pad_id)
        check_known(ids, known, tokenizer, "The actor", f"a prompt of `{name}`")
        return {"length": len(ids)}

    lengths: list[int] = dataset.map(
        length, remove_columns=dataset.column_names, num_proc=num_proc, desc=f"Checking the prompts of {name}"
    )["length"][:]
    if 0 in lengths:
        column = "prompt" if "prompt" in dataset.column_names else "input_ids"
        raise ValueError(
            f"Row {lengths.index(0)} of `{name}` has an empty prompt{_others_empty(lengths)}. Drop such rows: "
            f"`dataset.filter(lambda row: row[{column!r}])`."
        )
    needed = max(lengths, default=0) + response_length
    small = {limit: most for limit, most in limits.items() if most is not None and needed > most}
    if small:
        tokens = needed - response_length
        fits = " and ".join(f"{limit} of {most}" for limit, most in small.items())
        room = min(small.values()) - tokens
        lower = f", or lower `response_length` to at most {room}" if room > 0 else ""
        cure = f"Shorten or remove it, and all that are too long{lower}"
        if all("_tokens" in limit for limit in small):
            cure = f"Set {' and '.join(small)} to at least {needed}; or s{cure[1:]}"
        prompt = dataset[lengths.index(tokens)].get("prompt")
        shown = f" It begins {prompt[:40]!r}." if isinstance(prompt, str) else ""
        raise ValueError(
            f"The longest prompt of `{name}`, in row {lengths.index(tokens)}, has {tokens} tokens; with "
            f"`response_length={response_length}` it needs {needed} and does not fit {fits}. {cure}.{shown}"
        )


def _others_empty(lengths: list[int]) -> str:
    return f", as have {lengths.count(0) - 1} others" if lengths.count(0) > 1 else ""


def check_columns(dataset: Dataset | IterableDataset, name: str, tokenizer: Any) -> None:
    """Raise `ValueError` unless a dataset has prompts of text, token ids, or conversations with a chat template."""
    require(dataset, "prompts", name)
    columns = describe(dataset).columns
    images = {"image", "images"} & columns.keys()
    if images:
        raise ValueError(f"`{name}` has the column `{images.pop()}`; PPO reads text only. Remove the column.")
    prompt = columns.get("prompt")
    if "input_ids" in columns:
        return
    for column in ("tools", "chat_template_kwargs") if prompt == CONVERSATION else ():
        if any(_cells(dataset, column)):
            raise ValueError(
                f"`{name}` has the column `{column}`, which PPO does not read: every prompt is written with the same "
                f"options, those of the trainer's `tools` and of `chat_template_kwargs` in `PPOConfigX`. {OF_EACH_ROW}"
            )
    if prompt == "token ids":
        raise ValueError(
            f"The column 'prompt' of `{name}` holds token ids; PPO reads these in `input_ids`. Rename it: "
            "`dataset.rename_column('prompt', 'input_ids')`."
        )
    if prompt not in (TEXT, CONVERSATION, SHAREGPT, "empty list", "nothing"):
        raise ValueError(
            f"The column 'prompt' of `{name}` holds {prompt}; PPO reads text or conversations there, and token ids in "
            "`input_ids`. Write them as text in a new column, for example "
            "`dataset.map(lambda row: {'text': str(row['prompt'])}).remove_columns('prompt').rename_column('text', "
            "'prompt')`: in the old one datasets would make numbers of it again."
        )
    if prompt == SHAREGPT:
        raise ValueError(
            f"The prompts of `{name}` are messages with `from` and `value`; PPO reads `role` and `content`. "
            "`trl_ext.data.conversions.to_prompts(dataset)` renames them."
        )
    others = {column for column in ANSWERS if columns.get(column, prompt) in {TEXT, CONVERSATION} - {prompt}}
    if others:  # TRL looks at any of them to see what the prompt is
        raise ValueError(
            f"`{name}` has prompts of {prompt} beside {sorted(others)} of the other kind. PPO reads no answers: "
            "`trl_ext.data.conversions.to_prompts(dataset)` leaves them out."
        )
    if prompt == CONVERSATION:
        require_chat_template(dataset, tokenizer, name)


def _cells(dataset: Dataset | IterableDataset, column: str) -> list[Any]:
    """Return the cells of a column, of a stream those at its beginning; none without such a column."""
    if isinstance(dataset, Dataset):
        return list(dataset[column]) if column in dataset.column_names else []
    return [row.get(column) for row in islice(dataset, LOOKED_AT)]


def prompt_ids(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    pad_id: int | None = None,
) -> list[int]:
    """Return the tokens of a row's prompt as the actor reads them; none for an empty prompt."""
    if is_tokenised(row):
        return unpadded(row, pad_id, tokenizer.eos_token_id)
    prompt = row["prompt"]
    if not prompt or (is_conversational(row) and not any(message.get("content") for message in prompt)):
        return []
    if is_conversational(row):
        parts = [part for message in prompt if isinstance(message["content"], list) for part in message["content"]]
        others = {part.get("type") for part in parts} - {"text"}
        if others:
            raise ValueError(
                f"A prompt has a part of type {others.pop()!r}; PPO reads text only. Remove such prompts."
            )
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )["input_ids"]
    return tokenizer(prompt)["input_ids"]
