"""Load the rows that a command trains on, evaluates on or scores."""

import difflib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from ..data import demo
from ..data.conversions import to_conversations, to_preference
from ..data.formats import parse_columns
from ..data.json_values import key_of
from ..runs.folder import DATA_FILES
from .errors import PACKAGE, package_of


SHOWN = 4  # files that an error names


@dataclass
class DataArguments(DatasetMixtureConfig):
    """Which rows to train on and which to hold out. TRL's mixture, `datasets`, goes before `dataset_name`."""

    TOPIC: ClassVar[str] = "Data"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A json, jsonl, csv or parquet file, a folder written by `save_to_disk`, or a hub name. Unset: "
            "the embedded movie reviews."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on. If there is none: 10% of the training rows (`test_split_size`)."},
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={"help": "Read the rows while training. Needs `max_steps`, and a test split or `test_size`."},
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns to rename, new=old: `prompt=question chosen=good rejected=bad`. See docs/datasets.md."
        },
    )
    apply_chat_template: bool = field(
        default=False,
        metadata={
            "help": "Make conversations of text, for a model that was trained on chats: `prompt` is a turn of the "
            "user, answers are turns of the assistant. Unset: the model reads text as it is."
        },
    )
    train_size: int | None = field(default=None, metadata={"help": "Maximum number of rows to train on. Unset: all."})
    test_size: int | None = field(
        default=None, metadata={"help": "Maximum number of rows to evaluate on. Unset: all."}
    )

    @property
    def source(self) -> str:
        """Return where the rows come from, in words."""
        mixture = ", ".join(str(part.path) for part in self.datasets)
        return mixture or self.dataset_name or "embedded movie reviews (Hutto & Gilbert 2014)"


def flags_of(data: DataArguments) -> list[str]:
    """Return the flags by which another command reads the same rows; none for the embedded ones."""
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split")
    unset = DataArguments()
    flags = [(f"--{name}", getattr(data, name)) for name in names if getattr(data, name) != getattr(unset, name)]
    chats = ["--apply_chat_template"] if data.apply_chat_template else []
    return [
        *(word for flag in flags for word in flag),
        *(["--columns", *data.columns] if data.columns else []),
        *chats,
    ]


@dataclass
class PairArguments(DataArguments):
    TOPIC: ClassVar[str] = "The embedded pairs"

    min_gap: float = field(default=1.0, metadata={"help": "Smallest rating gap of the embedded pairs, 0 to 8."})


def load_pairs(data: PairArguments) -> DatasetDict:
    """Return pairs to train on and to evaluate on; the embedded ones without data of the user's own."""
    return load_splits(data, partial(demo.preference_pairs, data.min_gap), to_preference)


def load_splits(
    args: DataArguments,
    own: Callable[[int | None, int | None], DatasetDict],
    convert: Callable[[Any, Mapping[str, str]], Any],
) -> DatasetDict:
    """
    Return the splits `train` and `test`, with the columns that the user renames converted by `to_preference` or
    `to_prompts`; without data of the user's own, what `own` makes from `train_size` and `test_size`.
    """
    if args.dataset_name is None and not args.datasets:
        return own(args.train_size, args.test_size)
    splits = _load(args)
    if args.dataset_train_split not in splits:
        raise _no_split("train", splits, args)
    _require_rows(splits[args.dataset_train_split], args.dataset_train_split, args)
    train = _converted(splits[args.dataset_train_split], args, convert)
    if args.dataset_test_split not in (*splits, "test"):
        raise _no_split("test", splits, args, ", or leave it out")
    if args.dataset_test_split in splits:
        test = _converted(splits[args.dataset_test_split], args, convert)
    else:
        train, test = _hold_out(train, args)
    return DatasetDict(train=_first(train, args.train_size), test=_first(test, args.test_size))


def require_steps(rows: Any, max_steps: int) -> None:
    """Raise `ValueError` for a stream without `max_steps`: nothing says how many steps an epoch has."""
    if isinstance(rows, IterableDataset) and max_steps <= 0:
        raise ValueError("A stream has no length: give the number of steps, such as `--max_steps 1000`.")


def load_rows(args: DataArguments) -> Dataset:
    """Return at most `test_size` pairs of the test split, or of the training split where there is no other."""
    splits = _load(args)
    if args.dataset_test_split not in (*splits, "test"):
        raise _no_split("test", splits, args, ", or leave it out")
    for name in (args.dataset_test_split, args.dataset_train_split):
        if name in splits:
            _require_rows(splits[name], name, args)
            return _first(_converted(splits[name], args, to_preference), args.test_size)
    raise _no_split("test", splits, args)


def _converted(rows: Any, args: DataArguments, convert: Callable[[Any, Mapping[str, str]], Any]) -> Any:
    """Return rows in the format that a trainer reads, as conversations where that is wanted."""
    rows = convert(rows, parse_columns(args.columns or ()))
    return to_conversations(rows) if args.apply_chat_template else rows


def note_on_data(args: DataArguments, rows: Any, tokenizer: Any) -> str | None:
    """Return that no data are named, or what to know of text that a chat model is to read; `None` for other rows."""
    if not (args.dataset_name or args.datasets):
        return f"Note: the rows are {args.source}, since no data are named. `--dataset_name` names your own."
    first: dict[str, Any] = next(iter(rows), {})
    text = first.get("prompt", first.get("chosen"))
    if not isinstance(text, str) or not tokenizer.chat_template:
        return None
    return (
        "Note: the model reads these prompts as they are, since they are text and not conversations. If it was "
        "trained on chats, add `--apply_chat_template`, in reward training, DPO and PPO alike."
    )


def _no_split(kind: str, splits: Any, args: DataArguments, way_out: str = "") -> ValueError:
    option = f"dataset_{kind}_split"
    given, names = getattr(args, option), [*map(str, splits)]
    near = difflib.get_close_matches(given, names, n=1, cutoff=0)[0]
    return ValueError(
        f"{args.source!r} has no split {given!r}, but {', '.join(map(repr, names))}: write `--{option} {near}`"
        f"{way_out}."
    )


def _load(args: DataArguments) -> DatasetDict:
    if not args.datasets and not args.dataset_name:
        raise ValueError(
            "`dataset_name` is empty. Name a file, a folder or a dataset of the hub, or leave it out for the embedded "
            "movie reviews."
        )
    try:
        return _read(args)
    except Exception as error:  # of datasets, pyarrow, pandas and the hub: each raises its own
        if package_of(error) == PACKAGE:
            raise
        if "corresponds to no data" in str(error):  # what `datasets` says of a file with a heading alone
            raise ValueError(f"{args.source!r} holds no rows. {_row_for(args)}") from error
        _refuse_broken_file(Path(str(args.dataset_name)))
        raise ValueError(f"{args.source!r} cannot be read: {_reason(error, args)}") from error


def _reason(error: BaseException, args: DataArguments) -> str:
    """Return what went wrong at the bottom, in one line: `datasets` says no more than that something did."""
    name = str(args.dataset_name)
    if type(error).__name__ in ("DataFilesNotFoundError", "EmptyDatasetError"):
        return (
            f"it is a folder without a file of {', '.join(DATA_FILES)}, and not one that `save_to_disk` wrote. Give "
            f"a file{_such_as(name)}."
        )
    if type(error).__name__ in ("ConnectionError", "DatasetNotFoundError", "OfflineModeIsEnabled"):
        asked = "which was not reached" if "not" not in type(error).__name__.lower() else "which has none of that name"
        return (
            f"it is no file or folder here, and did not come from the hub, {asked}. Where there is a "
            f"network: `hf download --repo-type dataset {shlex.quote(name)}`. Or give a file{_such_as(name)}."
        )
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def _such_as(name: str) -> str:
    """Return, in a sentence, the files of data in this folder, that with the most similar name first."""
    files = sorted(
        str(each) for each in Path().glob("*.*") if each.suffix.lower() in DATA_FILES and each.stat().st_size
    )
    near = difflib.get_close_matches(name, files, n=1)
    if near or len(files) == 1:
        return f", such as `--dataset_name {shlex.quote((near or files)[0])}`"
    more = ", …" if len(files) > SHOWN else ""
    listed = f"; of the files here: {', '.join(map(repr, files[:SHOWN]))}{more}" if files else ""
    return f", `--dataset_name FILE`{listed}"


def _row_for(args: DataArguments) -> str:
    """Return how the rows of a command look."""
    answers = ', "chosen": "…", "rejected": "…"' if hasattr(args, "min_gap") or hasattr(args, "beta") else ""
    return f'Write one row in each line, as JSON: `{{"prompt": "…"{answers}}}`.'


def _read(args: DataArguments) -> DatasetDict:
    if args.datasets:
        # The rows that `test_split_size` holds out are drawn below, by a seed: on every rank the same.
        return get_dataset(DatasetMixtureConfig(args.datasets, args.streaming or args.dataset_streaming))
    name, streaming = str(args.dataset_name), args.dataset_streaming or args.streaming
    path = Path(name)
    is_saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()  # what `save_to_disk` writes
    if args.dataset_config is not None and (path.is_file() or is_saved):
        kind = "a file" if path.is_file() else "a saved set"
        raise ValueError(
            f"`dataset_config` is {args.dataset_config!r}, and {name} is {kind} here: only a dataset of the hub has "
            "configurations. Leave `--dataset_config` out."
        )
    if path.is_file() or path.suffix.lower() in DATA_FILES:
        _check_file(path, args)
        rows = load_dataset(DATA_FILES[path.suffix.lower()], data_files=str(path), streaming=streaming)
        _require_commas(path, rows)
        return rows
    if any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"{name!r} is the folder of a model: as such it is `--model {shlex.quote(name)}`. Give the folder of a "
            f"dataset, or a file with rows{_such_as(name)}."
        )
    if is_saved:
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    return load_dataset(name, args.dataset_config, streaming=streaming)


def _check_file(path: Path, args: DataArguments) -> None:
    """Raise `ValueError` for a file that does not exist, of a kind that is not read, or empty."""
    if not path.is_file():
        names = [str(other) for other in path.parent.glob("*.*") if other.suffix.lower() in DATA_FILES]
        near = difflib.get_close_matches(str(path), names, n=1, cutoff=0)
        meant = f"Did you mean `--dataset_name {shlex.quote(near[0])}`?" if near else "Give the path of a file."
        raise ValueError(f"There is no file {str(path)!r}. {meant}")
    with path.open("rb") as file:
        begin = file.read(4096)
    if not begin.strip():
        raise ValueError(f"The file {str(path)!r} is empty. {_row_for(args)}")
    if path.suffix.lower() in DATA_FILES:
        return
    known, better = f"{str(path)!r} is no file of {', '.join(DATA_FILES)}.", str(path.with_suffix(".csv"))
    kinds = {"excel": path.suffix.lower() in (".xlsx", ".xls"), "csv": b"\t" in begin.split(b"\n")[0]}
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is None:
        raise ValueError(f"{known} {_row_for(args)}")
    sign = ", sep='\\t'" if kind == "csv" else ""
    code = f"import pandas; pandas.read_{kind}({str(path)!r}{sign}).to_csv({better!r}, index=False)"
    raise ValueError(
        f'{known} Write it as CSV, with the names of the columns in the first line: `python -c "{code}"`, and give '
        f"`--dataset_name {shlex.quote(better)}`."
    )


def _refuse_broken_file(path: Path) -> None:
    """Raise `ValueError` with the place in a file of text that is not in UTF-8, or no JSON; others are let pass."""
    if not path.is_file() or path.suffix.lower() not in (".json", ".jsonl", ".csv"):
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        better = path.with_stem(f"{path.stem}-utf8")
        raise ValueError(
            f"{str(path)!r} is not in UTF-8: line {line} has the byte {error.object[error.start]:#x}. A file from "
            f"Excel may be in cp1252: `iconv -f cp1252 -t utf-8 {shlex.quote(str(path))} > "
            f"{shlex.quote(str(better))}`, and give `--dataset_name {shlex.quote(str(better))}`."
        ) from error
    if path.suffix.lower() == ".csv":
        return
    is_whole = text.lstrip().startswith("[")  # a list, or else a value in each line
    for number, part in enumerate([text] if is_whole else text.split("\n"), 1):
        try:
            json.loads(part or "{}")
        except json.JSONDecodeError as error:
            at: int = error.lineno if is_whole else number
            shown = text.split("\n")[at - 1].strip()
            raise ValueError(
                f"{str(path)!r} is no JSON in line {at}, `{shown:.60}`: {error.msg}. Each line must be one whole "
                'object, `{"prompt": "…"}`, or the file one list of them.'
            ) from error


def _require_commas(path: Path, rows: Any) -> None:
    """Raise `ValueError` for a CSV file whose columns something else than commas separates."""
    names = next((list(split.column_names or ()) for split in rows.values()), []) if path.suffix == ".csv" else []
    sign = next((sign for sign in ";\t|" if len(names) == 1 and sign in names[0]), None)
    if sign is not None:
        better = path.with_stem(f"{path.stem}-commas")
        code = f"import pandas; pandas.read_csv({str(path)!r}, sep={sign!r}).to_csv({str(better)!r}, index=False)"
        raise ValueError(
            f"{str(path)!r} has one column, {names[0]!r}: what separates its columns is {sign!r} and no comma. Write "
            f'it with commas, `python -c "{code}"`, and give `--dataset_name {shlex.quote(str(better))}`.'
        )


def _require_rows(rows: Any, name: str, args: DataArguments) -> None:
    try:
        first = next(iter(rows), None)
    except Exception as error:  # a stream is read here for the first time
        raise ValueError(f"The split {name!r} of {args.source!r} cannot be read: {_reason(error, args)}") from error
    if first is None:
        raise ValueError(f"The split {name!r} of {args.source!r} holds no rows. {_row_for(args)}")


def _hold_out(rows: Any, args: DataArguments) -> tuple[Any, Any]:
    """Divide a dataset with one split into rows to train on and rows to evaluate on."""
    if not isinstance(rows, IterableDataset):
        if len(rows) < 2:
            raise ValueError(
                f"{args.source!r} has only one row. At least two are needed, one to train on and one to hold out: add "
                "rows to it."
            )
        return _split(rows, 0.1 if args.test_split_size is None else args.test_split_size)
    if args.test_size is None:
        raise ValueError(
            f"A stream has no length to hold out a share of, and no split {args.dataset_test_split!r} was found: give "
            "`--test_size 100`, say, the number of rows to hold out, or the name of a split as "
            "`--dataset_test_split`."
        )
    return rows.skip(args.test_size), rows.take(args.test_size)


def _split(rows: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Hold out a share of the rows. Rows of one prompt stay together, if there are enough prompts."""
    prompts = [key_of(prompt) for prompt in rows["prompt"]] if "prompt" in rows.column_names else []
    distinct = list(dict.fromkeys(prompts))
    if len(distinct) == len(prompts) or len(distinct) < 10:
        parts = rows.train_test_split(test_size=share, seed=0)
        return parts["train"], parts["test"]
    held_out = set(_split(Dataset.from_dict({"text": distinct}), share)[1]["text"])
    is_held_out = [prompt in held_out for prompt in prompts]
    sides = [[i for i, held in enumerate(is_held_out) if held is wanted] for wanted in (False, True)]
    return rows.select(sides[0]), rows.select(sides[1])


def _first(rows: Any, size: int | None) -> Any:
    if size is None:
        return rows
    return rows.take(size) if isinstance(rows, IterableDataset) else rows.select(range(min(size, len(rows))))
