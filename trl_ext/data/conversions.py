"""Convert TRL's dataset formats to the one that a trainer needs: a dataset, a stream, or a dict of either."""

import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

from datasets import Dataset
from trl import maybe_convert_to_chatml, maybe_extract_prompt

from .formats import (
    CONVERSATION,
    LOOKED_AT,
    SHAREGPT,
    SYSTEM,
    TEXT,
    after_prompt,
    are_most,
    column_names,
    describe,
    of_each,
    rename,
    repeats_prompt,
    require,
    text_of,
)
from .json_values import key_of


logger = logging.getLogger(__name__)

ANSWERS = ("chosen", "rejected", "completion", "completions", "messages")
LABELS = {"label": "completion", "labels": "completions"}  # column -> what it says something about
CHATS = ("prompt", "completion", "chosen", "rejected", "messages", "conversations")
SIDES = ("chosen", "rejected")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names -> those that chat templates know
TURN = "\n\nAssistant:"  # what opens an answer in Anthropic's hh-rlhf


def to_preference(dataset: Any, columns: Mapping[str, str] | None = None) -> Any:
    """
    Return pairs: `chosen` and `rejected`, and `prompt` if it is given. A dataset that has them stays as it is, except:

    - Conversations with `from` and `value` get `role` and `content`; a content in parts of text becomes their text.
    - A column `system` becomes the first turn of the prompt, which makes conversations of text.
    - A prompt that both completions begin with again, in most of the first rows, is taken off them.
    - A text `prompt` beside conversations becomes the turns that they begin with (`trl.maybe_extract_prompt`), or, of
      conversations that hold answers only, a turn of the user.
    - Unpaired preferences: the good and the bad completions of a prompt are paired in their order, the shorter list
      repeated, so that each of them is in a pair; other columns are those of the good one. Prompts whose completions
      have one label only are left out, with a warning.

    Args:
        columns: names to change first, new -> old; see [`rename`]. `{"prompt": "instruction+input"}` joins columns.

    Raises:
        ValueError: when there are no pairs in it.
    """
    if isinstance(dataset, dict):
        return of_each(dataset, lambda each: to_preference(each, columns))
    dataset = _with_plain_text(_with_roles(rename(dataset, columns or {})))
    if describe(dataset).name in ("preference", "unpaired preference"):
        dataset = _with_system(dataset)
    found = describe(dataset)
    if found.name == "unpaired preference":
        return _pair_up(dataset)
    require(dataset, "preference")
    if found.columns.get("prompt") == TEXT and found.columns["chosen"] == found.columns["rejected"] == CONVERSATION:
        return dataset.map(_with_turns)
    repeats = [repeats_prompt(row) for row in islice(iter(dataset), LOOKED_AT)]
    if not are_most(repeats):
        return dataset

    def without(row: dict[str, Any]) -> dict[str, Any]:
        repeated = repeats_prompt(row)
        return {side: after_prompt(row[side], row["prompt"]) if repeated else row[side] for side in SIDES}

    return dataset.map(without)


def to_prompts(dataset: Any, columns: Mapping[str, str] | None = None) -> Any:
    """
    Return prompts: `prompt`, or `input_ids` as they are, without the columns of answers, and with all others, which
    reward functions may read. Content in parts, and `system`, are as in [`to_preference`]. The prompt of `messages` is
    all before the last answer, that of pairs without `prompt` what they have in common (`trl.maybe_extract_prompt`),
    in hh-rlhf's format up to "Assistant:".

    Args:
        columns: names to change first, new -> old; see [`rename`].

    Raises:
        ValueError: when there are no prompts in it.
    """
    if isinstance(dataset, dict):
        return of_each(dataset, lambda each: to_prompts(each, columns))
    dataset = _with_system(_with_plain_text(_with_roles(rename(dataset, columns or {}))))
    found = describe(dataset)
    if found.name == "preference with an implicit prompt":
        dataset = dataset.map(_common_beginning)
    elif found.name == "preference" and found.columns["prompt"] == TEXT and found.columns["chosen"] == CONVERSATION:
        dataset = dataset.map(lambda row: {"prompt": _with_turns(row)["prompt"]})
    elif "messages" in found.columns and "prompt" not in found.columns:
        dataset = dataset.map(_before_the_answer)
    require(dataset, "prompts")
    names = set(column_names(dataset))
    labels = {label for label, of in LABELS.items() if of in names}  # a label beside a prompt alone is a reward's
    return dataset.remove_columns(sorted(names & {*ANSWERS, *labels}))


def to_conversations(dataset: Any) -> Any:
    """
    Return pairs or prompts of text as conversations, which a chat template writes out: `prompt` becomes a turn of the
    user, `chosen` and `rejected` turns of the assistant. A dataset of conversations or of token ids stays as it is.

    Raises:
        ValueError: for pairs of text without `prompt`, which do not say where the answer begins.
    """
    if isinstance(dataset, dict):
        return of_each(dataset, to_conversations)
    columns = describe(dataset).columns
    if "prompt" not in columns and columns.get("chosen") == TEXT:
        raise ValueError(
            "Pairs of text without `prompt` do not say where the answer begins, so that no conversation can be made "
            f"of them; the columns are {describe(dataset)}. Give a column `prompt`: `--columns prompt=NAME`."
        )
    return dataset.map(_as_turns, remove_columns=column_names(dataset)) if columns.get("prompt") == TEXT else dataset


def _as_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Turn the text of a prompt and of answers into turns of the user and the assistant."""
    roles = {"prompt": "user"} | dict.fromkeys(("chosen", "rejected", "completion"), "assistant")
    texts = {name: row[name] for name in roles if isinstance(row.get(name), str)}
    return dict(row) | {name: [{"role": roles[name], "content": text}] for name, text in texts.items()}


def _with_roles(dataset: Any) -> Any:
    """Turn conversations in ShareGPT's format into messages with `role` and `content`."""
    columns = describe(dataset).columns
    if "conversations" not in columns and not any(columns.get(name) == SHAREGPT for name in CHATS):
        return dataset

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        chats = {name: row[name] for name in CHATS if name in row}
        copies = {name: [dict(m) for m in chat] if isinstance(chat, list) else chat for name, chat in chats.items()}
        chats = maybe_convert_to_chatml(copies)
        for messages in chats.values():
            for message in messages if isinstance(messages, list) else ():
                message["role"] = ROLES.get(message["role"], message["role"])
        return {name: value for name, value in row.items() if name not in CHATS} | chats

    return dataset.map(convert, remove_columns=column_names(dataset))


def _with_plain_text(dataset: Any) -> Any:
    """Join contents that come in parts of text; those with other parts, such as images, stay."""
    first = next(iter(dataset), None) or {}
    chats = [name for name in CHATS if isinstance(first.get(name), list) and any(map(_in_parts, first[name]))]

    def joined(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": text_of(message)} if _in_parts(message) else message

    def join(row: dict[str, Any]) -> dict[str, Any]:
        return dict(row) | {name: [joined(message) for message in row[name]] for name in chats}

    return dataset.map(join, remove_columns=column_names(dataset)) if chats else dataset


def _in_parts(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return bool(content) and isinstance(content, list) and all(part.get("type") == "text" for part in content)


def _with_system(dataset: Any) -> Any:
    """Turn a text column `system` beside `prompt` into the first turn of a conversation."""
    columns = describe(dataset).columns
    if columns.get(SYSTEM) not in (TEXT, "nothing") or columns.get("prompt") not in (TEXT, CONVERSATION):
        return dataset

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        system = row.get(SYSTEM)
        row = _as_turns({name: value for name, value in row.items() if name != SYSTEM})
        if system and row["prompt"][0]["role"] != SYSTEM:
            row["prompt"] = [{"role": SYSTEM, "content": system}, *row["prompt"]]
        return row

    return dataset.map(convert, remove_columns=column_names(dataset))


def _with_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Turn the text prompt of two conversations into a conversation that they continue."""
    extracted = maybe_extract_prompt({name: row[name] for name in ("prompt", "chosen", "rejected")})
    if extracted["prompt"]:
        return extracted
    return extracted | {"prompt": [{"role": "user", "content": row["prompt"]}]}


def _common_beginning(row: dict[str, Any]) -> dict[str, Any]:
    prompt = maybe_extract_prompt({name: row[name] for name in ("chosen", "rejected")})["prompt"]
    if isinstance(prompt, str) and TURN in prompt:  # the answers themselves may begin alike
        prompt = prompt[: prompt.rindex(TURN) + len(TURN)]
    return {"prompt": prompt}


def _before_the_answer(row: dict[str, Any]) -> dict[str, Any]:
    messages = row["messages"]
    return {"prompt": messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages}


def _pair_up(dataset: Any) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "Unpaired preferences are paired by their prompts, of which a stream shows one row after the other. Load "
            "the rows: `Dataset.from_list(list(stream))`, or without `streaming`."
        )
    prompts: dict[str, dict[bool, list[dict[str, Any]]]] = {}  # each with its rows by label
    for i, row in enumerate(dataset):
        if row["label"] not in (True, False):
            raise ValueError(
                f"Row {i} has the label {row['label']!r}; the label of an unpaired preference is true or false, or 1 "
                "or 0. Make it so with `dataset.map`."
            )
        prompts.setdefault(key_of(row["prompt"]), {True: [], False: []})[bool(row["label"])].append(row)
    pairs, one_sided = [], 0
    for rows in prompts.values():
        good, bad = rows[True], rows[False]
        one_sided += not (good and bad)
        for i in range(max(len(good), len(bad)) if good and bad else 0):
            liked, disliked = good[i % len(good)], bad[i % len(bad)]
            others = {name: value for name, value in liked.items() if name not in ("completion", "label")}
            pairs.append(others | {"chosen": liked["completion"], "rejected": disliked["completion"]})
    if not pairs:
        raise ValueError(
            f"All completions of each prompt have the same label ({len(prompts)} prompts), so that nothing can be "
            "compared. Add completions with the other label for the same `prompt`."
        )
    if one_sided:
        logger.warning("Left out %d of %d prompts: their completions have one label only.", one_sided, len(prompts))
    return Dataset.from_list(pairs)
