"""Which rows a command trains on, evaluates on or scores."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from trl import DatasetMixtureConfig, get_dataset

from ..conversions import to_preference
from ..formats import parse_columns


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class DataArguments(DatasetMixtureConfig):
    """
    Data

    Which rows to train on and which to hold out. `datasets` is TRL's mixture; it goes before `dataset_name`.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A json, jsonl, csv or parquet file, a folder written by `save_to_disk`, or a hub name. Unset: "
            "the embedded movie reviews."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test",
        metadata={"help": "Split to evaluate on; 10% of the training rows (`test_split_size`) if there is none."},
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
    train_size: int | None = field(default=None, metadata={"help": "Rows to train on, at most. Unset: all."})
    test_size: int | None = field(default=None, metadata={"help": "Rows to evaluate on, at most. Unset: all."})

    @property
    def source(self) -> str:
        """Where the rows come from, for people."""
        mixture = ", ".join(str(part.path) for part in self.datasets)
        return mixture or self.dataset_name or "embedded movie reviews (Hutto & Gilbert 2014)"


def load_splits(
    args: DataArguments,
    embedded: Callable[[int | None, int | None], DatasetDict],
    convert: Callable[[Any, Mapping[str, str]], Any],
) -> DatasetDict:
    """
    The splits `train` and `test`.

    Args:
        embedded: gives them, from `train_size` and `test_size`, where there are no data of the user's own.
        convert: `to_preference` or `to_prompts`, which gets the columns to rename.
    """
    if args.dataset_name is None and not args.datasets:
        return embedded(args.train_size, args.test_size)
    splits = _load(args)
    if args.dataset_train_split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split {args.dataset_train_split!r} but {list(splits)}; choose one with "
            "`--dataset_train_split`."
        )
    columns = parse_columns(args.columns or ())
    train = convert(splits[args.dataset_train_split], columns)
    if args.dataset_test_split in splits:
        test = convert(splits[args.dataset_test_split], columns)
    else:
        train, test = _hold_out(train, args)
    return DatasetDict(train=_first(train, args.train_size), test=_first(test, args.test_size))


def load_rows(args: DataArguments) -> Dataset:
    """All pairs of the test split, or of the training split where there is no other; at most `test_size`."""
    splits = _load(args)
    for name in (args.dataset_test_split, args.dataset_train_split):
        if name in splits:
            return _first(to_preference(splits[name], parse_columns(args.columns or ())), args.test_size)
    raise ValueError(
        f"{args.dataset_name} has no split {args.dataset_test_split!r} but {list(splits)}; choose one with "
        "`--dataset_test_split`."
    )


def _load(args: DataArguments) -> DatasetDict:
    if args.datasets:
        # The rows that `test_split_size` holds out are drawn below, by a seed: on every rank the same.
        return get_dataset(DatasetMixtureConfig(args.datasets, args.streaming or args.dataset_streaming))
    name, streaming = str(args.dataset_name), args.dataset_streaming or args.streaming
    path = Path(name)
    if path.is_file() and path.suffix in BUILDERS:
        return load_dataset(BUILDERS[path.suffix], data_files=str(path), streaming=streaming)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():  # what `save_to_disk` writes
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    return load_dataset(name, args.dataset_config, streaming=streaming)


def _hold_out(rows: Any, args: DataArguments) -> tuple[Any, Any]:
    """Rows to train on and rows to evaluate on, of a dataset with one split."""
    if not isinstance(rows, IterableDataset):
        parts = rows.train_test_split(test_size=args.test_split_size or 0.1, seed=0)
        return parts["train"], parts["test"]
    if args.test_size is None:
        raise ValueError(
            f"A stream has no length to hold out a share of, and no split {args.dataset_test_split!r} was found: give "
            "`--test_size`, the number of rows to hold out, or `--dataset_test_split`."
        )
    return rows.skip(args.test_size), rows.take(args.test_size)


def _first(rows: Any, size: int | None) -> Any:
    if size is None:
        return rows
    return rows.take(size) if isinstance(rows, IterableDataset) else rows.select(range(min(size, len(rows))))
