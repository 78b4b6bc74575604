"""What the scripts share: parse a recipe and its overrides, load the data, choose the dtype of the device."""

import argparse
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from transformers import Trainer
from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_dataset

from .device import computes_in_bf16, keep_4_bit_differentiable
from .planner import Hardware, layout_from_options, names_from_options, plan, plan_text, this_machine


__all__ = [
    "DataArguments",
    "FitArguments",
    "ModelArguments",
    "first_and_last_evaluation",
    "keep_4_bit_differentiable",
    "load_rows",
    "load_splits",
    "parse",
    "require_fit",
]

# Options of the trainers' base classes that most runs touch; `--help` shows these, `--help_all` every option.
COMMON = (
    "output_dir learning_rate lr_scheduler_type warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing max_length bf16 use_cpu seed "
    "logging_steps eval_strategy eval_steps eval_on_start save_strategy save_steps report_to deepspeed"
).split()
BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class FitArguments:
    """What to do with a run that the planner expects not to fit; see `require_fit`."""

    force: bool = field(
        default=False,
        metadata={"help": "Train even where the planner says that the run does not fit the GPU's memory."},
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model options, with `--model` for short and a dtype that follows the device."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Model to start from: a path or a hub name. Unset: SmolLM2-135M."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Data type of the weights. Unset: float32, which a GPU computes on in bfloat16 (see --bf16); with "
            "--use_peft on a GPU bfloat16, as most weights are frozen.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )

    def init_kwargs(self, use_cpu: bool = False) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`."""
        # Small updates of bfloat16 weights round to nothing, so weights that are trained in full are kept in float32.
        dtype = "bfloat16" if self.use_peft and computes_in_bf16(use_cpu) else "float32"
        kwargs = {"dtype": self.dtype or dtype, "revision": self.model_revision}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs


@dataclass
class DataArguments(DatasetMixtureConfig):
    """Which rows to train on and which to hold out. `datasets` is TRL's mixture; it goes before `dataset_name`."""

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
    train_size: int | None = field(default=None, metadata={"help": "Rows to train on, at most. Unset: all."})
    test_size: int | None = field(default=None, metadata={"help": "Rows to evaluate on, at most. Unset: all."})

    @property
    def source(self) -> str:
        """Where the rows come from, for people."""
        mixture = ", ".join(str(part.path) for part in self.datasets)
        return mixture or self.dataset_name or "embedded movie reviews (Hutto & Gilbert 2014)"


# -------------------------------------------------------------------------------------------------------------- parse


def parse(
    dataclasses: Iterable[type],
    description: str,
    demo: Path | None,
    argv: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> tuple:
    """
    Instances of `dataclasses` from, in rising order: their own defaults, `defaults`, the YAML recipe, the flags.

    The recipe is the file given with `--config`. Without one, and without a dataset of the user's own, it is `demo`,
    whose settings fit the embedded data. An unknown key or flag is a `ValueError`. A recipe's `env` is put into the
    environment, as TRL does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(dataclasses, description=description, allow_abbrev=False)
    parser.set_defaults_with_config(**(defaults or {}))
    if "--help_all" in argv:
        parser.show_all()
        argv.append("--help")
    options = [flag for flag in argv if flag not in ("-h", "--help")]
    known, _ = parser.parse_known_args(options)
    own_data = known.dataset_name is not None or known.datasets
    recipe = known.config or (None if own_data else demo)
    if recipe is not None:
        _apply_recipe(parser, Path(recipe))
    known, _ = parser.parse_known_args(options)
    if known.use_cpu or not torch.cuda.is_available():
        parser.set_defaults(dataloader_pin_memory=False)  # there is no GPU to pin it for
    if getattr(known, "bf16", False) is None:  # TRL would take bfloat16, on a CPU too
        parser.set_defaults(bf16=not known.fp16 and computes_in_bf16(known.use_cpu))
    parsed = parser.parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    return parsed[: len(parser.dataclass_types)]  # behind them comes a namespace with --config


def _apply_recipe(parser: "_Parser", path: Path) -> None:
    """Sets the parser's defaults from a YAML mapping; a key is the name of a flag, `model` and `model_name_or_path`
    alike."""
    recipe = _read_recipe(path)
    os.environ.update({name: str(value) for name, value in (recipe.pop("env", None) or {}).items()})
    options = {name: action.dest for action in parser._actions for name in action.option_strings}
    unknown = [key for key in recipe if f"--{key}" not in options]
    if unknown:
        raise ValueError(f"Unknown options in the recipe {path}: {unknown}. `--help_all` lists every option.")
    parser.set_defaults_with_config(**{options[f"--{key}"]: value for key, value in recipe.items()})


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe = yaml.safe_load(path.read_text()) or {}
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} holds a {type(recipe).__name__}; it must hold `option: value` lines.")
    return recipe


def recipe_options(dataclasses: Iterable[type], recipe: str | Path) -> dict[str, Any]:
    """
    Option names and values of a recipe, with the defaults of `dataclasses` for what it leaves open. Nothing is built
    from them, so a recipe for other hardware can be read. Keys that `dataclasses` do not know are a script's own.
    """
    parser = _Parser(dataclasses, allow_abbrev=False)
    options = {name: action.dest for action in parser._actions for name in action.option_strings}
    given = {options[f"--{key}"]: value for key, value in _read_recipe(Path(recipe)).items() if f"--{key}" in options}
    parser.set_defaults_with_config(**given)
    return vars(parser.parse_known_args([])[0])


def require_fit(trainer: str, *arguments: Any, hardware: Hardware | None = None) -> None:
    """
    Before anything is loaded: plans the run on the GPUs of this launch.

    Args:
        trainer: "ppo" or "dpo".
        arguments: what `parse` returned.
        hardware: what it is to fit; unset: this machine, and without a GPU nothing is checked.

    Raises:
        SystemExit: with the plan and the smallest change, when the run does not fit and `--force` is not given.
    """
    options: dict[str, Any] = {name: value for part in arguments for name, value in vars(part).items()}
    if options["force"]:
        return
    if hardware is None:
        if options["use_cpu"] or not torch.cuda.is_available():
            return
        hardware = this_machine()
    try:
        planned = plan(names_from_options(options), layout_from_options(trainer, options, hardware), hardware)
    except ValueError as reason:  # a model or a layout that the planner cannot read is the trainer's to refuse
        print(f"Whether the run fits has not been planned: {reason}", file=sys.stderr)
        return
    if not planned.fits:
        assumed = f"Prompts of {planned.layout.prompt} tokens are assumed. " if trainer == "ppo" else ""
        raise SystemExit(f"{plan_text(planned)}\n\n{assumed}Nothing has been loaded. `--force` trains all the same.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """One name per option (`--max_steps INT`), though argparse knows its hyphens too, and no empty defaults."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=119)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, []) else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name.removeprefix("--") or name == "-h"]
        value = "" if action.nargs == 0 else f" {self._format_args(action, str(action.metavar or 'VALUE'))}"
        return ", ".join(names) + value


class _Parser(TrlParser):
    """`TrlParser` with its options grouped by the class that defines them, and the rare ones hidden from `--help`."""

    def __init__(self, dataclasses: Iterable[type], **kwargs: Any):
        self._hidden: dict[argparse.Action, str | None] = {}
        super().__init__(list(dataclasses), formatter_class=_HelpFormatter, usage="%(prog)s [options]", **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="Recipe: a YAML file of options, overridden by flags.")
        self.add_argument("--help_all", action="store_true", default=None, help="Show every option and exit.")

    def show_all(self) -> None:
        for action, text in self._hidden.items():
            action.help = text

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """As the parent does, one argument group for each class in `dtype`'s ancestry."""
        hints, groups = get_type_hints(dtype), {}
        for option in fields(dtype):
            if not option.init:
                continue
            option.type = hints[option.name]
            owner = next(c for c in dtype.__mro__ if option.name in inspect.get_annotations(c))
            if owner not in groups:
                groups[owner] = self.add_argument_group(f"options of {owner.__name__}")
            ours = owner is dtype or owner.__module__.startswith("trl_ext.")
            self._add_option(groups[owner], option, shown=ours or option.name in COMMON)

    def _add_option(self, group: Any, option: Field, shown: bool) -> None:
        known = len(group._group_actions)
        self._parse_dataclass_field(group, option)
        for action in group._group_actions[known:]:
            # Some of the parents' texts hold a bare "%", which argparse would take for a format.
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help or "")
            kind = getattr(action.type, "__name__", "")
            action.metavar = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "BOOL"}.get(kind)
            if action.choices:
                action.metavar = "{" + ",".join(map(str, action.choices)) + "}"
            is_negation = action.option_strings[0].startswith("--no_")
            if not shown or is_negation:
                self._hidden[action], action.help = action.help, argparse.SUPPRESS


# --------------------------------------------------------------------------------------------------------------- load


def load_splits(args: DataArguments, embedded: Callable[[int | None, int | None], DatasetDict]) -> DatasetDict:
    """The splits `train` and `test`; without data of the user's own, what `embedded(train_size, test_size)` makes."""
    if args.dataset_name is None and not args.datasets:
        return embedded(args.train_size, args.test_size)
    splits = _load(args)
    if args.dataset_train_split not in splits:
        raise ValueError(
            f"{args.dataset_name} has no split {args.dataset_train_split!r} but {list(splits)}; choose one with "
            "`--dataset_train_split`."
        )
    train = splits[args.dataset_train_split]
    if args.dataset_test_split in splits:
        test = splits[args.dataset_test_split]
    else:
        train, test = _hold_out(train, args)
    return DatasetDict(train=_first(train, args.train_size), test=_first(test, args.test_size))


def load_rows(args: DataArguments) -> Dataset:
    """All rows of the test split, or of the training split where there is no other; at most `test_size`."""
    splits = _load(args)
    for name in (args.dataset_test_split, args.dataset_train_split):
        if name in splits:
            return _first(splits[name], args.test_size)
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


def first_and_last_evaluation(trainer: Trainer, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last log line with the metric `key`; evaluates where the last one is not of the last step."""

    def held_out() -> list[dict[str, Any]]:
        return [line for line in trainer.state.log_history if key in line]

    if not held_out() or held_out()[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    return held_out()[0], held_out()[-1]
