"""
Tell which of TRL's formats a dataset is in, what a trainer needs, and how to get from one to the other.

TRL's formats are sets of columns: `text` or `messages` (language modeling), `prompt` (prompt-only), `prompt` and
`completion`, `chosen` and `rejected` with or without `prompt` (preference), `prompt`, `completion` and `label`
(unpaired preference), `prompt`, `completions` and `labels` (stepwise supervision). Each holds text, or conversations:
lists of messages with `role` and `content`. [`describe`] recognises them, [`rename`] gives columns the names that TRL
knows, [`require`] says what is wrong with a dataset that a trainer cannot use, and how to map it.
"""

import difflib
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict


logger = logging.getLogger(__name__)

TEXT, CONVERSATION, SHAREGPT = "text", "conversation", "conversation with `from` and `value`"
CELLS = (TEXT, CONVERSATION, SHAREGPT)
# Format -> what its columns hold. The first whose columns are all there is taken.
FORMATS: dict[str, dict[str, tuple[str, ...]]] = {
    "preference": {"prompt": CELLS, "chosen": CELLS, "rejected": CELLS},
    "preference with an implicit prompt": {"chosen": CELLS, "rejected": CELLS},
    "unpaired preference": {"prompt": CELLS, "completion": CELLS, "label": ("true or false", "number")},
    "stepwise supervision": {"prompt": CELLS, "completions": ("list of text",), "labels": ("list of true or false",)},
    "prompt-completion": {"prompt": CELLS, "completion": CELLS},
    "prompt-only": {"prompt": CELLS},
    "tokenised prompts": {"input_ids": ("token ids",)},
    "language modeling, conversations": {"messages": (CONVERSATION, SHAREGPT)},
    "language modeling, ShareGPT": {"conversations": (CONVERSATION, SHAREGPT)},
    "language modeling": {"text": (TEXT,)},
}
# Task -> the formats that a trainer reads, those that can be converted, the columns to map, and this in words.
TASKS = {
    "preference": (
        ("preference", "preference with an implicit prompt"),
        ("unpaired preference",),
        ("prompt", "chosen", "rejected"),
        "Training on preferences needs `chosen` and `rejected`, text or conversations, and `prompt` where they do not "
        "begin with it.",
    ),
    "prompts": (
        ("prompt-only", "tokenised prompts"),
        ("preference with an implicit prompt", "language modeling, conversations", "language modeling, ShareGPT"),
        ("prompt",),
        "PPO needs `prompt`, text or conversation, or `input_ids`, token ids.",
    ),
}
# Names that datasets use for TRL's columns, the commonest first.
SYNONYMS = {
    "prompt": "question instruction query problem user user_input context input prompts",
    "chosen": "chosen_response response_chosen chosen_answer answer_chosen good preferred better winner accepted "
    "positive chosen_completion good_answer good_response best_answer preferred_answer preferred_response "
    "response_a answer_a completion_a response_1 answer_1",
    "rejected": "rejected_response response_rejected rejected_answer answer_rejected bad dispreferred worse loser "
    "negative rejected_completion bad_answer bad_response worst_answer dispreferred_answer dispreferred_response "
    "response_b answer_b completion_b response_2 answer_2",
}
# Of a row without a second answer.
ONE_ANSWER = {"messages", "conversations", "text", "output", "response", "answer", "completion"}
# What says nothing of which answer is the better one.
IN_ORDER = re.compile(r".*_[ab12]$", re.IGNORECASE)

LOOKED_AT = 8  # rows of a dataset
# Columns that are a part of a prompt and no column that a trainer reads.
SYSTEM = "system"
SYSTEMS = (SYSTEM, "system_prompt", "system_message")
LEFT_OUT = {"preference": (*SYSTEMS, "instruction", "input"), "prompts": SYSTEMS}
# Columns that a trainer reads, or that hold answers.
READ = {
    "preference": "prompt chosen rejected completion completions label labels tools".split(),
    "prompts": "prompt chosen rejected completion completions label labels messages".split(),
}
# What data say of themselves and no model is to read: "id", "prompt_id", "chosen_model", "language", …
METADATA = re.compile(
    r"(.*_)?(id|ids|uuid|idx|index|hash|model|models|source|dataset|subset|split|config|category|type|lang|language|url"
    r"|link|license|score|scores|rating|ratings|rank|margin|tag|tags|date|time|timestamp|author|annotator|worker"
    r"|version|meta|metadata)",
    re.IGNORECASE,
)
SHARED = 5  # characters: answers that begin with fewer alike do so by chance


@dataclass(frozen=True)
class Format:
    """What a dataset is: its format, a key of `FORMATS`, or `None`; and each column with what its first row holds."""

    name: str | None
    columns: dict[str, str]

    def __str__(self) -> str:
        return ", ".join(f"{name!r} ({kind})" for name, kind in self.columns.items()) or "none"


def describe(dataset: Dataset | IterableDataset) -> Format:
    """Return the format of a dataset, from the names of its columns and its first row."""
    row = next(iter(dataset), None)
    columns = dict.fromkeys(dataset.column_names or (), "no rows")
    if row is not None:
        columns = {name: _kind(value) for name, value in row.items()}
    for name, needed in FORMATS.items():
        if all(columns.get(column) in kinds for column, kinds in needed.items()):
            return Format(name, columns)
    return Format(None, columns)


def _kind(value: Any) -> str:
    """Return what a cell holds, in words."""
    if isinstance(value, list | tuple) and value:
        if isinstance(value[0], dict):
            is_message = {"role": CONVERSATION, "from": SHAREGPT}
            return next((kind for key, kind in is_message.items() if key in value[0]), "list of structures")
        return "token ids" if type(value[0]) is int else f"list of {_kind(value[0])}"
    kinds = {str: TEXT, bool: "true or false", int: "number", float: "number", dict: "structure", list: "empty list"}
    return "nothing" if value is None else kinds.get(type(value), type(value).__name__)


# ---- Names ----


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    """Read columns as written on a command line, `["prompt=question"]`; `ValueError` for a name given twice."""
    columns: dict[str, str] = {}
    for pair in pairs:
        new, sign, old = (part.strip() for part in pair.partition("="))
        if not (new and sign and old):
            raise ValueError(
                f"{pair!r} maps no column: write `--columns {new or 'prompt'}=NAME`, with the name that the column "
                "has in the data."
            )
        if new in columns or old in columns.values():
            raise ValueError(
                f"{pair!r} maps {new if new in columns else old!r} a second time; give each column one name."
            )
        columns[new] = old
    return columns


def rename(dataset: Any, columns: Mapping[str, str]) -> Any:
    """
    Return the dataset with columns renamed.

    Args:
        columns: new name -> the name it has; several names with a plus between them are joined, as paragraphs.

    Raises:
        ValueError: for a name that the dataset does not have, with the nearest that it has; for a new name that is
            taken.
    """
    if isinstance(dataset, dict):
        return of_each(dataset, lambda each: rename(each, columns))
    dataset, columns = _with_joined(dataset, columns)
    names = column_names(dataset)
    listed = f"the columns are {', '.join(map(repr, sorted(names)))}"
    if columns and not set(columns.values()) & set(names) and set(columns) <= set(names):
        right = _with_prompt({old: new for new, old in columns.items()}, names)
        raise ValueError(f"The columns are mapped the wrong way round: it is new=old, {_flag_of(right)}; {listed}.")
    for new, old in columns.items():
        if old not in names:
            near = {each: difflib.get_close_matches(each, names, n=1, cutoff=0.6) for each in columns.values()}
            right = _with_prompt({each: (near[was] or ["NAME"])[0] for each, was in columns.items()}, names)
            meant = f"Did you mean {_flag_of(right)}?" if near[old] else f"Write {_flag_of(right)}."
            raise ValueError(f"There is no column {old!r} to become {new!r}; {listed}. {meant}")
        if new in names and new != old and new not in columns.values():
            raise ValueError(
                f"{old!r} cannot become {new!r}: the dataset has a column {new!r} already. Give that another name too,"
                f" `old_{new}={new}`, or remove it: `dataset.remove_columns({new!r})`."
            )
    changes = {old: new for new, old in columns.items() if old != new}
    return dataset.rename_columns(changes) if changes else dataset


def _with_prompt(columns: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return a mapping, with the column that is likely the prompt where the data would have none."""
    free = [name for name in names if name not in columns.values()]
    prompt = None if "prompt" in columns or "prompt" in names else _nearest("prompt", free)
    return columns if prompt is None else {"prompt": prompt, **columns}


def _flag_of(columns: Mapping[str, str]) -> str:
    """Return the flag that renames columns, to be shown."""
    return f"`--columns {' '.join(shlex.quote(f'{new}={old}') for new, old in columns.items())}`"


def _with_joined(dataset: Any, columns: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """Join columns of text, such as "instruction+input"; return the dataset and the columns left to rename."""
    left, names = dict(columns), column_names(dataset)
    for new, old in columns.items():
        parts = [part.strip() for part in old.split("+")]
        if old in names or len(parts) < 2 or not set(parts) <= set(names):
            continue

        def join(row: dict[str, Any], new: str = new, parts: list[str] = parts) -> dict[str, Any]:
            others = {name: value for name, value in row.items() if name not in parts}
            return others | {new: "\n\n".join(row[part] for part in parts if row[part])}

        dataset = dataset.map(join, remove_columns=names)
        names, left = column_names(dataset), {key: value for key, value in left.items() if key != new}
    return dataset, left


def suggest_columns(dataset: Dataset | IterableDataset, task: str) -> dict[str, str]:
    """Guess new name -> present name for the columns that `task` needs and the dataset lacks; all, or none."""
    known, (_, _, wanted, _) = describe(dataset).columns, TASKS[task]
    free = [name for name, kind in known.items() if kind in CELLS and name not in wanted]
    nearest = {new: _nearest(new, free) for new in wanted if new not in known}
    found = {new: old for new, old in nearest.items() if old is not None}
    needed = {"chosen", "rejected"} if task == "preference" else {"prompt"}
    return found if needed <= found.keys() | known.keys() else {}


def _nearest(new: str, names: list[str]) -> str | None:
    plain = {name.lower().replace("-", "_").replace(" ", "_"): name for name in names}
    for likely in (new, *SYNONYMS[new].split()):
        if likely in plain:
            return plain[likely]
    close = difflib.get_close_matches(new, plain, n=1, cutoff=0.75)
    return plain[close[0]] if close else None


# ---- Errors ----


def require(dataset: Dataset | IterableDataset, task: str, name: str = "dataset") -> None:
    """
    Require the columns that `task` needs: "preference", for DPO and reward models, or "prompts", for PPO.

    Raises:
        ValueError: when one is missing, with the columns, their format, what is needed, and the nearest way there.
    """
    found, (formats, _, wanted, needs) = describe(dataset), TASKS[task]
    if any(FORMATS[each].keys() <= found.columns.keys() for each in formats):
        _require_whole_prompts(dataset, task, name)
        return
    needed = [each for each in wanted if task == "prompts" or each != "prompt"]
    missing = [repr(each) for each in needed if each not in found.columns]
    what = f" (in TRL's terms {found.name})" if found.name else ""
    raise ValueError(
        f"`{name}` has no column{'s' if len(missing) > 1 else ''} {' and '.join(missing)}; its columns are "
        f"{found}{what}. {_way_out(dataset, task, needs)}"
    )


def _require_whole_prompts(dataset: Dataset | IterableDataset, task: str, name: str) -> None:
    """Raise `ValueError` for a column that looks like a part of the prompt and that no trainer would read."""
    columns, unread = describe(dataset).columns, _unread(dataset, task)
    has_prompt = "prompt" in columns
    likely = LEFT_OUT[task] if has_prompt else (*SYSTEMS, *SYNONYMS["prompt"].split())
    lost = {column: unread[column] for column in likely if column in unread}
    if not has_prompt:
        pairs = [(row.get("chosen"), row.get("rejected")) for row in islice(iter(dataset), LOOKED_AT)]
        texts = [(squashed(a), squashed(b)) for a, b in pairs if isinstance(a, str) and isinstance(b, str)]
        if are_most([a[:SHARED] != b[:SHARED] for a, b in texts]):  # no prompt in common: it must be somewhere else
            lost |= unread
    if not lost:
        return
    parts = (["prompt"] if has_prompt else []) + [column for column in lost if column not in SYSTEMS]
    systems = [column for column in lost if column in SYSTEMS]
    mapping = {} if parts in ([], ["prompt"]) else {"prompt": "+".join(parts)}
    if systems and systems[0] != SYSTEM:
        mapping[SYSTEM] = systems[0]
    flag = f"`--columns {' '.join(f'{new}={old}' for new, old in mapping.items())}`, in Python " if mapping else ""
    way = f"{flag}`trl_ext.data.conversions.to_{task}(dataset{f', {mapping}' if mapping else ''})`"
    if columns.get("chosen") == TEXT and any(columns[column] not in (TEXT, "nothing") for column in lost):
        way = "one conversation in `prompt`, and the answers as messages of the assistant"
    raise ValueError(
        f"`{name}` has the columns {', '.join(map(repr, columns))}. Nothing would read "
        f"{' and '.join(map(repr, lost))}, and what is read does not hold it: {next(iter(lost.values()))!r:.80}. "
        f"Make it a part of the prompt: {way}; or remove it: `dataset.remove_columns({list(lost)})`."
    )


def warn_of_unread(dataset: Dataset | IterableDataset, task: str, name: str) -> None:
    """Warn of columns of text that nothing reads and that may be a part of the prompt; [`require`] lets them pass."""
    unread = _unread(dataset, task)
    if unread:
        logger.warning(
            "Nothing reads the columns %s of `%s`. If they belong to the prompts, make them a part of `prompt`, as "
            "docs/datasets.md shows; otherwise `dataset.remove_columns(%s)` says that they do not.",
            ", ".join(map(repr, unread)),
            name,
            list(unread),
        )


def _unread(dataset: Dataset | IterableDataset, task: str) -> dict[str, str]:
    """Return columns of text, without metadata, each with its first cell that is nowhere in what is read."""
    columns = describe(dataset).columns
    if {"input_ids", "image", "images"} & columns.keys():
        return {}
    found: dict[str, str] = {}
    others = [name for name in columns if name not in READ[task] and not METADATA.fullmatch(name)]
    for row in _telling_rows(dataset, others):
        read = squashed("".join(_text_of_cell(row[column]) for column in ("prompt", "chosen") if column in row))
        for column in others:
            text = _text_of_cell(row.get(column))
            if squashed(text) not in read:
                found.setdefault(column, text)
    return found


def _telling_rows(dataset: Dataset | IterableDataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the first rows; of a table also the first row that fills each column that is empty in them."""
    rows = list(islice(iter(dataset), LOOKED_AT))
    yield from rows
    for column in columns if isinstance(dataset, Dataset) and len(dataset) > LOOKED_AT else ():
        if not any(row[column] for row in rows):
            filled = next((i for i, value in enumerate(dataset[column][:]) if value), None)
            yield from [] if filled is None else [dataset[filled]]


def _text_of_cell(value: Any) -> str:
    """Return the text in a cell, of its messages too; nothing of numbers and structures."""
    if isinstance(value, list | tuple):
        return "".join(map(_text_of_cell, value))
    if isinstance(value, dict):
        return text_of(value) if {"content", "value"} & value.keys() else ""
    return value if isinstance(value, str) else ""


def require_chat_template(dataset: Dataset | IterableDataset, tokenizer: Any, name: str = "dataset") -> None:
    """Raise `ValueError` for conversations if the tokenizer has no template to write them with."""
    conversations = [column for column, kind in describe(dataset).columns.items() if kind == CONVERSATION]
    if conversations and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{' and '.join(map(repr, conversations))} of `{name}` hold conversations, and the tokenizer has "
            "no chat template to write them as text with. Start from a chat model, give columns of text, or set "
            "`tokenizer.chat_template` and save the tokenizer into the model's folder."
        )


def _way_out(dataset: Dataset | IterableDataset, task: str, needs: str) -> str:
    known, columns = describe(dataset), suggest_columns(dataset, task)
    found = known.name
    if columns:
        names = {old: new for new, old in columns.items()}
        chosen = columns.get("chosen", "")
        order = (
            f" Make sure first that {chosen!r} is the better answer in every row." if IN_ORDER.match(chosen) else ""
        )
        return f"Map the columns: {_flag_of(columns)}, in Python `dataset.rename_columns({names})`.{order}"
    if found in TASKS[task][1]:
        return f"{needs} `trl_ext.data.conversions.to_{task}(dataset)` makes it so."
    if found == "prompt-completion" and "label" in column_names(dataset):
        return (
            "A `label` of true or false, or 1 or 0, would tell good completions from bad ones: make it so with "
            "`dataset.map`, then pairs with `trl_ext.data.conversions.to_preference(dataset)`."
        )
    example = "prompt=question chosen=good rejected=bad" if task == "preference" else "prompt=question"
    if task == "preference" and found == "prompt-only" and len(known.columns) == 1:
        return "These are prompts, without answers to prefer: `trl-ext ppo` trains on them; preferences are pairs."
    if task == "preference" and (ONE_ANSWER & known.columns.keys()) and "chosen" not in known.columns:
        return (
            "A row has one answer, and a preference is between two: give each row a better one, 'chosen', and a worse "
            "one, 'rejected'. On one answer each, with columns 'prompt' and 'completion', `trl sft` trains."
        )
    return (
        f"{needs} Map what it has, as in `--columns {example}` or `dataset.rename_columns`; docs/datasets.md has the "
        "formats."
    )


# ---- Datasets of every kind ----


def column_names(dataset: Any) -> list[str]:
    """Return the column names; a stream may know them by its first row only."""
    return list(dataset.column_names or next(iter(dataset), {}))


def of_each(datasets: dict[str, Any], change: Callable[[Any], Any]) -> Any:
    """Return the same kind of dict, each dataset changed; an error names the split."""
    changed = {}
    for name, dataset in datasets.items():
        try:
            changed[name] = change(dataset)
        except ValueError as error:
            raise ValueError(f"In the split {name!r}: {error}") from error
    return type(datasets)(changed) if isinstance(datasets, DatasetDict | IterableDatasetDict) else changed


# ---- Messages ----


def text_of(message: dict[str, Any]) -> str:
    """Return the text of a message, which may come in parts."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def after_prompt(answer: Any, prompt: Any) -> Any:
    """Return what an answer adds to a prompt that it repeats, white space aside; `None` if it does not."""
    if type(prompt) not in (str, list) or type(answer) is not type(prompt):
        return None
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return None
    if answer[: len(prompt)] == prompt:
        return answer[len(prompt) :]
    if isinstance(prompt, str) and answer.lstrip().startswith(prompt.strip()):
        return answer.lstrip()[len(prompt.strip()) :]
    return None


def repeats_prompt(row: dict[str, Any]) -> bool:
    """Return whether both answers of a pair begin with its prompt."""
    return all(after_prompt(row[side], row.get("prompt")) is not None for side in ("chosen", "rejected"))


def are_most(of_rows: Sequence[bool]) -> bool:
    """Return whether more than half are true: an answer to "Hi" may begin with "Hi" without repeating its prompt."""
    return 2 * sum(of_rows) > len(of_rows)


def squashed(text: str) -> str:
    """Return a text without white space, which templates strip and add."""
    return "".join(text.split())
