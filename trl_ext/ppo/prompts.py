"""Prompts: the columns a dataset may bring them in, and the checks that run before any model is loaded."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import is_conversational

from ..conversions import ANSWERS
from ..formats import CONVERSATION, SHAREGPT, TEXT, describe, require, require_chat_template
from .config import PPOConfigX


NO_IDS_TO_COLLATE = (
    "`data_collator` collates tokenised prompts, and {name} has no column `input_ids` but {columns}. Remove the "
    "collator: the trainer tokenises and pads `prompt` itself."
)


class TokenisedPrompt(str):
    """
    The text of a prompt that came as token ids (TRL 1.12's `input_ids`), together with those ids, which are used as
    they are.
    """

    input_ids: list[int]

    def __new__(cls, text: str, input_ids: list[int]) -> "TokenisedPrompt":
        prompt = super().__new__(cls, text)
        prompt.input_ids = input_ids
        return prompt

    def __deepcopy__(self, memo: dict) -> "TokenisedPrompt":
        return self


def is_tokenised(row: dict[str, Any]) -> bool:
    """Whether the row's prompt comes as token ids."""
    return "input_ids" in row


def with_tokenised_prompts(
    rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, data_collator: Callable | None
) -> list[dict[str, Any]]:
    """
    Rows with `input_ids` -> rows with a [`TokenisedPrompt`] under "prompt". A data collator sees the rows first, as in
    TRL 1.12; the padding that it adds is taken off by its attention mask, or else by the pad token.
    """
    if data_collator is None:
        all_ids = [list(row["input_ids"]) for row in rows]
    else:
        batch = data_collator(rows)
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else ids != tokenizer.pad_token_id
        all_ids = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
    texts = tokenizer.batch_decode(all_ids, skip_special_tokens=True)
    prompts = [TokenisedPrompt(text, ids) for text, ids in zip(texts, all_ids, strict=True)]
    return [
        {name: value for name, value in row.items() if name not in ("input_ids", "attention_mask")}
        | {"prompt": prompt}
        for row, prompt in zip(rows, prompts, strict=True)
    ]


def check_datasets(
    train_dataset: Any,
    eval_dataset: Any,
    collator: Callable | None,
    tokenizer: Any,
    context: int | None,
    args: PPOConfigX,
) -> None:
    """Checks every map-style dataset's prompts, and the columns of a stream's first row."""
    if train_dataset is None:
        raise ValueError("There are no prompts: pass `train_dataset` with a column `prompt` or `input_ids`.")
    for name, dataset in named(train_dataset, eval_dataset).items():
        if isinstance(dataset, Dataset | IterableDataset):
            if next(iter(dataset), None) is None:
                raise ValueError(f"`{name}` has no rows; PPO needs prompts.")
            check_columns(dataset, name, tokenizer)
        if not isinstance(dataset, Dataset):
            continue
        if collator is not None and "input_ids" not in dataset.column_names:
            raise ValueError(NO_IDS_TO_COLLATE.format(name=f"`{name}`", columns=dataset.column_names))
        check_prompts(
            dataset, name, tokenizer, context, args.response_length, args.dataset_num_proc, args.chat_template_kwargs
        )
    if isinstance(train_dataset, Dataset) and len(train_dataset) < args.batch_size:
        raise ValueError(
            f"`train_dataset` has {len(train_dataset)} prompts and a rollout takes {args.batch_size} "
            "(per_device_train_batch_size × gradient_accumulation_steps × world size). Add prompts or lower it."
        )


def named(train_dataset: Any, eval_dataset: Any) -> dict[str, Any]:
    """A run's datasets, by what errors call them."""
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    datasets = {"train_dataset": train_dataset}
    return datasets | {f"eval_dataset{f'[{key!r}]' if key else ''}": dataset for key, dataset in held_out.items()}


def check_prompts(
    dataset: Dataset,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    longest: int | None,
    response_length: int,
    num_proc: int | None = None,
    template_kwargs: dict[str, Any] | None = None,
    whose: str = "the model's",
) -> None:
    """
    Raises `ValueError` unless every row has a prompt that, with its response, fits the model's context.

    Args:
        dataset: a map-style dataset with `prompt` (text or conversation) or `input_ids` (a list of token ids).
        name: what to call it in the error.
        longest: the model's context in tokens; `None` when it has no limit.
        response_length: tokens that a response may have.
        template_kwargs: keyword arguments of the chat template.
        whose: context, for the error.
    """

    def length(row: dict[str, Any]) -> dict[str, int]:
        return {"length": len(prompt_ids(row, tokenizer, template_kwargs or {}))}

    lengths = dataset.map(
        length, remove_columns=dataset.column_names, num_proc=num_proc, desc=f"Checking the prompts of {name}"
    )["length"]
    for row, tokens in enumerate(lengths):
        if tokens == 0:
            raise ValueError(f"Row {row} of `{name}` has an empty prompt. Remove it, or give it at least one token.")
        if longest is not None and tokens + response_length > longest:
            raise ValueError(
                f"The prompt in row {row} of `{name}` has {tokens} tokens; with response_length={response_length} it "
                f"does not fit {whose} context of {longest}. Shorten or remove it, or lower `response_length`."
            )


def check_columns(dataset: Dataset | IterableDataset, name: str, tokenizer: Any) -> None:
    """Raises `ValueError` unless a dataset holds prompts of text, token ids or conversations that can be written."""
    require(dataset, "prompts", name)
    columns = describe(dataset).columns
    images = {"image", "images"} & columns.keys()
    if images:
        raise ValueError(f"`{name}` has the column `{images.pop()}`; PPO reads text only. Remove the column.")
    prompt = columns.get("prompt")
    if "input_ids" in columns:
        return
    if prompt == SHAREGPT:
        raise ValueError(
            f"The prompts of `{name}` are messages with `from` and `value`; PPO reads `role` and `content`. "
            "`trl_ext.conversions.to_prompts(dataset)` renames them."
        )
    others = {column for column in ANSWERS if columns.get(column, prompt) in {TEXT, CONVERSATION} - {prompt}}
    if others:  # TRL looks at any of them to see what the prompt is
        raise ValueError(
            f"`{name}` has prompts of {prompt} beside {sorted(others)} of the other kind. PPO reads no answers: "
            "`trl_ext.conversions.to_prompts(dataset)` leaves them out."
        )
    if prompt == CONVERSATION:
        require_chat_template(dataset, tokenizer, name)


def prompt_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> list[int]:
    """The tokens that the actor reads of a row's prompt; none of an empty one."""
    if is_tokenised(row):
        return row["input_ids"]
    prompt = row["prompt"]
    if not prompt or (is_conversational(row) and not any(message.get("content") for message in prompt)):
        return []
    if is_conversational(row):
        _require_text(prompt)
        return tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template_kwargs
        )["input_ids"]
    return tokenizer(prompt)["input_ids"]


def _require_text(messages: list[dict[str, Any]]) -> None:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    others = {part.get("type") for part in parts} - {"text"}
    if others:
        raise ValueError(f"A prompt has a part of type {others.pop()!r}; PPO reads text only. Remove such prompts.")
