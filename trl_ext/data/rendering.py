"""Check that the first rows of a dataset are written as they are meant: prompt and answers there, nothing twice."""

import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from datasets import Dataset, Features, Json
from transformers import PreTrainedTokenizerBase
from trl import maybe_extract_prompt

from .formats import LOOKED_AT, are_most, column_names, repeats_prompt, squashed, text_of


THOUGHTS = ("reasoning_content", "thinking")  # keys of a message that hold what was thought before its content
CALLS = "tool_calls"  # the key of those that a message makes
THINK = "<think>"
MOST_KINDS = 32  # of conversations, one row of each is looked at


def check_pairs(dataset: Any, name: str, tokenizer: Any) -> None:
    """Raise `ValueError` if the tokenizer would write a part of the first pairs not at all, twice, or as Python."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):  # a processor, which takes images too
        return
    rows = list(_first(dataset))
    repeats = [isinstance(row.get("prompt"), str) and repeats_prompt(row) for _, row in rows]
    if are_most(repeats):
        number, row = rows[repeats.index(True)]
        raise ValueError(
            f"`chosen` and `rejected` of row {number} of `{name}` begin with the prompt, so the model would "
            f"read it twice: {row['chosen']!r:.120}. `trl_ext.data.conversions.to_preference(dataset)` removes it."
        )
    for number, row in rows:
        where = f"row {number} of `{name}`"
        kept: Any = {column: row[column] for column in ("prompt", "chosen", "rejected") if column in row}
        pair: Any = maybe_extract_prompt(kept)
        if isinstance(pair["chosen"], str):
            check_text(pair["prompt"], where, tokenizer)
            bos = tokenizer.bos_token
            for side in ("chosen", "rejected") if bos and bos != tokenizer.eos_token and pair["prompt"] else ():
                if pair[side].lstrip().startswith(bos):
                    raise ValueError(
                        f"`{side}` of {where} begins with {bos!r}, which would stand behind the prompt. Take it off: "
                        f"`row[{side!r}].lstrip().removeprefix({bos!r})`."
                    )
            continue
        tools = row.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools
        options: dict[str, Any] = {"tools": tools, **template_kwargs(row)}
        for side in ("chosen", "rejected"):
            written = _written(pair["prompt"] + pair[side], where, tokenizer, **options)
            _require_names(options["tools"], squashed(written), f"`tools` of {where}")
            _check_messages(pair["prompt"], written, f"the prompt of {where}", tokenizer)
            _check_messages(pair[side], written, f"`{side}` of {where}", tokenizer, answers=True)


def check_written_prompts(
    dataset: Any,
    name: str,
    tokenizer: Any,
    options: dict[str, Any] | None,
    ids_of: Callable[[dict[str, Any]], list[int]],
) -> None:
    """
    Raise `ValueError` as [`check_pairs`] does, of prompts, with `options` of the chat template. `ids_of` gives the ids
    of a row with `input_ids` that are read: without padding, which may be the BOS token.
    """
    for number, row in _first(dataset):
        where, prompt = f"row {number} of `{name}`", row.get("prompt")
        if "input_ids" in row:
            _check_ids(ids_of(row), where, tokenizer)
        elif isinstance(prompt, str):
            check_text(prompt, where, tokenizer)
        elif prompt:
            written = _written(prompt, where, tokenizer, add_generation_prompt=True, **(options or {}))
            _check_messages(prompt, written, f"the prompt of {where}", tokenizer)


def template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row's own arguments of the chat template, without the `None` of those that only other rows have."""
    return {name: value for name, value in (row.get("chat_template_kwargs") or {}).items() if value is not None}


def with_template_kwargs(dataset: Any) -> Any:
    """Return the dataset with each row's own `chat_template_kwargs`, without those that are `None`."""
    if "chat_template_kwargs" not in column_names(dataset):
        return dataset
    options = {}
    if isinstance(dataset, Dataset):  # in a table of structures every row would have every key
        options["features"] = Features(dataset.features | {"chat_template_kwargs": Json()})
    return dataset.map(lambda row: {"chat_template_kwargs": template_kwargs(row)}, **options)


def _first(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield some rows with their numbers: the first of a stream, of a table some from all over it."""
    if not isinstance(dataset, Dataset):
        yield from enumerate(islice(iter(dataset), LOOKED_AT))
        return
    step = max(1, len(dataset) // LOOKED_AT)
    spread = range(0, len(dataset), step)[:LOOKED_AT]
    for number in sorted({*spread, *_first_of_each_kind(dataset)}):
        yield number, dataset[number]


def _first_of_each_kind(dataset: Dataset) -> list[int]:
    """Return the first row of each kind of conversation: of the roles in it, of thoughts and calls of tools."""
    columns = [name for name in ("prompt", "chosen", "rejected", "tools") if name in dataset.column_names]
    firsts: dict[Any, int] = {}
    for number, cells in enumerate(zip(*(dataset[name][:] for name in columns), strict=True)):
        firsts.setdefault(tuple(map(_kind_of, cells)), number)
    return list(firsts.values())[:MOST_KINDS]


def _kind_of(cell: Any) -> Any:
    if not isinstance(cell, list):
        return cell is None
    messages = [message for message in cell if isinstance(message, dict)]
    marks = {name for message in messages for name in (*THOUGHTS, CALLS) if message.get(name)}
    marks |= {THINK for message in messages if THINK in text_of(message)}
    return frozenset(marks | {str(message.get("role")) for message in messages})


def _written(messages: list[dict[str, Any]], where: str, tokenizer: Any, **options: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # jinja's, what a template raises itself, Python's within an expression: any says it
        raise ValueError(
            f"The tokenizer's chat template cannot write {where} (roles {[m.get('role') for m in messages]}): {error}."
            " Change the messages, or `tokenizer.chat_template`." + _joined_by(messages)
        ) from error


def _check_messages(
    messages: list[dict[str, Any]], written: str, whose: str, tokenizer: Any, answers: bool = False
) -> None:
    """Raise `ValueError` if a message is not written whole; of `answers`, the last one with its thoughts."""
    plain = squashed(written)
    for number, message in enumerate(messages):
        text = text_of(message)
        content = message.get("content")
        if isinstance(content, list) and any(form in written for part in content for form in (str(part), _json(part))):
            raise ValueError(
                f"The content of {whose} is a list of parts, which the chat template writes out as they stand: "
                f"{written!r:.200}." + _joined_by(messages)
            )
        is_learnt = answers and number == len(messages) - 1
        thoughts = [str(message[key]) for key in THOUGHTS if is_learnt and message.get(key)]
        is_past = message.get("role") == "assistant" and not is_learnt
        # A part is written as it is or, as what a tool returns in Llama 3.1's template, as JSON.
        missing = [
            part
            for part in ([] if is_past else [text, *thoughts])
            if squashed(part) not in plain and squashed(_json(part)[1:-1]) not in plain
        ]
        if missing:
            raise ValueError(
                f"The chat template leaves out a part of {whose}: it says {missing[0]!r:.120}, and what is written is "
                f"{written!r:.300}. Set a `tokenizer.chat_template` that keeps it (one for R1 cuts off what was "
                "thought), or take out of the data what is not to be learnt."
            )
        _require_names(message.get(CALLS), plain, f"`{CALLS}` of {whose}")
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        ends_twice = eos and text.rstrip().endswith(eos) and squashed(eos * 2) in plain
        if ends_twice or (bos and text.startswith(bos)):
            raise ValueError(
                f"A message of {whose} is written as text already: {text!r:.120}. The chat template would put its "
                f"marks around it again. Take {bos!r} and {eos!r} out of the messages, or give text instead of "
                "messages."
            )


def _require_names(functions: Any, plain: str, whose: str) -> None:
    """Raise `ValueError` for tools, or calls of them, that a template does not write; many do not know them."""
    each = [one for one in functions or () if isinstance(one, dict)]
    names = [one.get("name") or (one.get("function") or {}).get("name") for one in each]
    missing = [name for name in names if name and squashed(name) not in plain]
    if missing:
        raise ValueError(
            f"The chat template leaves out {whose}: {missing[0]!r} is not in what it writes. Set a "
            "`tokenizer.chat_template` that writes tools and calls, or take them out of the data."
        )


def _json(value: Any) -> str:
    """Return what the filter `tojson` of chat templates writes."""
    return json.dumps(value, ensure_ascii=False)


def check_text(prompt: str, where: str, tokenizer: Any) -> None:
    """Raise `ValueError` for a text prompt that begins with BOS twice, or that the tokenizer puts EOS behind."""
    ids, eos = tokenizer(prompt)["input_ids"], tokenizer.eos_token
    reads_both_ways = tokenizer.cls_token is not None  # as RoBERTa's, which may score text, and writes none
    is_ended = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id  # one alone may be BOS, as OPT's
    if is_ended and not (prompt.rstrip().endswith(eos) or reads_both_ways):
        raise ValueError(
            f"The tokenizer ends every text with {eos!r}, also the prompt of {where}, which an answer is to follow: "
            f"{tokenizer.decode(ids)!r:.120}. Set `tokenizer.add_eos_token = False`, or take the token out of its "
            "post-processor."
        )
    if _begins_twice(ids, tokenizer):
        raise ValueError(
            f"The prompt of {where} begins with {tokenizer.bos_token!r}, and the tokenizer puts another before it: it "
            "is written by a chat template already. Give the messages instead, or take it off the text: "
            f"`row[column].lstrip().removeprefix({tokenizer.bos_token!r})`."
        )


def _check_ids(ids: list[int], where: str, tokenizer: Any) -> None:
    if _begins_twice(ids, tokenizer):
        raise ValueError(
            f"`input_ids` of {where} begin with {tokenizer.bos_token!r} ({tokenizer.bos_token_id}) twice: they are of "
            "text that a chat template has written, to which the tokenizer added another. Tokenise such text with "
            "`add_special_tokens=False`, or take one of the two out of the list, with its place in `attention_mask`."
        )


def _begins_twice(ids: list[int], tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    second = ids.index(bos, 1) if bos is not None and bos in ids[1:] else None
    return second is not None and ids[0] == bos and not tokenizer.decode(ids[1:second]).strip()  # white space between


def _joined_by(messages: list[dict[str, Any]]) -> str:
    if not any(isinstance(message.get("content"), list) for message in messages):
        return ""
    return " `trl_ext.data.conversions.to_preference(dataset)`, of prompts `to_prompts(dataset)`, joins parts of text."
