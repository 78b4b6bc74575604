"""Check a dataset of preference pairs, for DPO and reward models."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .formats import CELLS, CONVERSATION, SHAREGPT, describe, require, require_chat_template, warn_of_unread
from .rendering import check_pairs


NEEDED = ("chosen", "rejected")
OPTIONAL = ("prompt",)
FROM_SHAREGPT = " `trl_ext.data.conversions.to_preference(dataset)` makes that of 'from' and 'value'."
TO_ONE_KIND = " `trl_ext.data.conversions.to_preference(dataset)` makes turns of the prompts."


def check_columns(train_dataset: Any, eval_dataset: Any, tokenizer: Callable[[], Any]) -> None:
    """
    Raise `ValueError` for preference pairs without their columns, with anything in them but text or messages, or with
    conversations that the tokenizer, `None` if not known yet, has no chat template for.
    """
    held_out = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
    for name, dataset in {"train_dataset": train_dataset, **held_out}.items():
        if not isinstance(dataset, Dataset | IterableDataset):
            continue
        if next(iter(dataset), None) is None:
            raise ValueError(f"`{name}` has no rows.")
        require(dataset, "preference", name)
        _check_cells(name, dataset)
        warn_of_unread(dataset, "preference", name)
        check_written(name, dataset, tokenizer)


def check_written(name: str, dataset: Any, tokenizer: Callable[[], Any]) -> None:
    """Raise `ValueError` for pairs that the tokenizer, or its chat template, cannot write as they are meant."""
    columns = describe(dataset).columns
    if {"image", "images"} & columns.keys():
        return
    known = tokenizer()
    if known is None:
        return
    if columns["chosen"] == CONVERSATION:
        require_chat_template(dataset, known, name)
    elif isinstance(known, PreTrainedTokenizerBase) and known.eos_token is None:
        raise ValueError(
            f"`{name}` holds text, which ends with the tokenizer's eos token, and the tokenizer has none. Set "
            "`processing_class.eos_token`."
        )
    check_pairs(dataset, name, known)


def _check_cells(name: str, dataset: Any) -> None:
    """Raise `ValueError` for cells that are empty, or of two kinds; of a stream, the first row is looked at."""
    row = next(iter(dataset))
    columns = [column for column in (*OPTIONAL, *NEEDED) if column in row]
    for column in columns:
        value = row[column]
        if not isinstance(value, str) and not _is_conversation(value):
            raise ValueError(
                f"The column {column!r} of `{name}` holds {type(value).__name__} "
                f"({value!r:.60}); it must hold text, or a conversation: a list of messages with 'role' and "
                f"'content'. "
                f"{_other_column(dataset, column)}"
                + (FROM_SHAREGPT if describe(dataset).columns[column] == SHAREGPT else "")
            )
    text = [column for column in columns if isinstance(row[column], str)]
    conversations = [column for column in columns if column not in text]
    if text and conversations:
        raise ValueError(
            f"In `{name}` {text} hold text and {conversations} conversations; they must be of one kind."
            + (TO_ONE_KIND if "prompt" in text and len(text) == 1 else "")
        )
    for column in columns:
        cells = dataset[column] if isinstance(dataset, Dataset) else [row[column]]
        kinds = [_kind(value) for value in cells]
        other = next((i for i, kind in enumerate(kinds) if kind not in (kinds[0], "nothing")), None)
        if other is not None and kinds[0] != "nothing":
            raise ValueError(
                f"The column {column!r} of `{name}` holds {kinds[0]} in its first row and {kinds[other]} in row "
                f"{other} ({cells[other]!r:.60}). Make all rows text, or all conversations, or drop that row."
            )
        empty = [i for i, kind in enumerate(kinds) if kind == "nothing"]
        if empty:
            raise ValueError(
                f"The column {column!r} of `{name}` is empty in {len(empty)} of {len(cells)} rows, the first is "
                f"row {empty[0]}{_beside(dataset, column, empty[0])}. Drop these rows: "
                f"`dataset.filter(lambda row: row[{column!r}])`."
            )
        if column in NEEDED and conversations:
            for i, messages in enumerate(cells):
                _check_roles(messages, "prompt" in columns, f"`{column}` of row {i} of `{name}`")
    if conversations and "prompt" not in row and row["chosen"][0] != row["rejected"][0]:
        raise ValueError(
            f"`{name}` has no column 'prompt', and the conversations of its first row have no turn in common to take "
            "it from. Give the prompts in `prompt`, or as the first messages of both `chosen` and `rejected`."
        )


def _other_column(dataset: Any, column: str) -> str:
    """Return what to do about a column of something else than answers: which other column may hold them."""
    columns = describe(dataset).columns
    other = next((name for name, kind in columns.items() if kind in CELLS and name not in (*OPTIONAL, *NEEDED)), None)
    if other is None:
        return f'Write the text into it, such as `{{"{column}": "The capital is Paris."}}`.'
    return f"If {other!r} holds it, map that: `--columns old_{column}={column} {column}={other}`."


def _beside(dataset: Any, column: str, row: int) -> str:
    """Return a text of the same row: where rows were shuffled, their numbers are not those of the file."""
    others = dataset[row].items() if isinstance(dataset, Dataset) else ()
    return next((f", whose {name!r} is {text!r:.60}" for name, text in others if isinstance(text, str) and text), "")


def _kind(value: Any) -> str:
    """Return what a cell holds, in words."""
    if value is None or value == []:
        return "nothing"
    return "text" if isinstance(value, str) else "a conversation" if _is_conversation(value) else type(value).__name__


def _check_roles(messages: list[dict[str, Any]], has_prompt: bool, whose: str) -> None:
    """Raise `ValueError` for an answer that the assistant does not begin, or does not end."""
    roles = [message.get("role") for message in messages]
    if roles[-1] != "assistant":
        raise ValueError(
            f"{whose} ends with a message of the role {roles[-1]!r} (roles {roles}); an answer is the assistant's. "
            "Give it the role 'assistant', or drop the row."
        )
    if has_prompt and roles[0] not in ("assistant", "tool"):
        raise ValueError(
            f"{whose} begins with a message of the role {roles[0]!r} (roles {roles}), and there is a `prompt` before "
            "it. Where the answers repeat the prompt, "
            "`trl_ext.data.conversions.to_preference(dataset)` takes it off them."
        )


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def require_rows_left(dataset: Any, name: str, why: str) -> None:
    """Raise `ValueError` for a stream of which no row is left; reads up to the first that is."""
    if isinstance(dataset, IterableDataset) and next(iter(dataset), None) is None:
        raise ValueError(f"No row of the stream of {name} rows is left: {why}.")
