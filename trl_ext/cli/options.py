"""Read the options of a command from defaults, recipe and flags, and make its config objects of them."""

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..models.precision import computes_in_bf16
from ..runs.requirements import check_optimizable, check_startable
from .errors import known_cure
from .flags import is_negation, misspelt, not_understood
from .parser import OptionParser
from .recipes import INSTALLED, RECIPES, find_config, find_deepspeed, read_recipe
from .wording import Wording


class Options:
    """
    Option names and values of a command, and its words; no config is made of them yet, no device is touched. Of a
    recipe of the user's own also its `keys`, the options that it sets.
    """

    def __init__(
        self,
        parser: OptionParser,
        values: argparse.Namespace,
        argv: list[str],
        recipe: Path | None = None,
        keys: Collection[str] = (),
    ):
        self.parser, self.values, self.argv, self.recipe, self.keys = parser, values, argv, recipe, keys

    def __getattr__(self, name: str) -> Any:
        return getattr(self.values, name)

    @property
    def wording(self) -> Wording:
        """Return how the command says an error about these options."""
        typed = {word.partition("=")[0] for word in self.argv}
        actions = [action for action in self.parser._actions if not typed & {*action.option_strings}]
        return Wording(
            self.parser,
            data=getattr(self.values, "dataset_name", None),
            is_renamed=bool(getattr(self.values, "columns", None)),
            recipe=self.recipe,
            from_recipe={action.dest for action in actions} & {*self.keys},
        )

    def make(self, **changes: Any) -> tuple:
        """Make an instance of each of the command's classes, with `changes` on top; `ValueError` if one refuses."""
        values = vars(self.values) | changes
        _require_mappings(values)
        check_startable(self.values)
        try:
            made = tuple(
                kind(**{o.name: values[o.name] for o in fields(kind) if o.init and o.name in values})
                for kind in self.parser.dataclass_types
            )
        except OSError as error:
            names = [f"`{name}`" for name, value in values.items() if error.filename and value == error.filename]
            raise ValueError(f"{' and '.join(names) or 'A file'} cannot be read: {error}. Give another.") from error
        except json.JSONDecodeError as error:  # of an option that is a mapping
            name = next((name for name, value in values.items() if value == error.doc), "NAME")
            raise ValueError(
                f"`{name}` is {error.doc!r}, which is no JSON: {error.msg} at character {error.pos + 1}. Put names in "
                f"double quotes, and the whole in single ones, such as {_as_json(name, '')}."
            ) from error
        except (ValueError, TypeError) as error:  # of the keys of a mapping, too
            raise ValueError(known_cure(error) or " ".join(str(error).split())) from error
        for each in made:
            if isinstance(each, TrainingArguments):
                check_optimizable(each)
        return made


def _require_mappings(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for keyword arguments that are no JSON object: transformers reads no other text."""
    for name, value in values.items():
        if name.endswith("_kwargs") and isinstance(value, str) and not value.lstrip().startswith("{"):
            raise ValueError(f"`{name}` is {value!r}; it must be a JSON object: {_as_json(name, value)}.")
    pairs = values.get("optim_args")
    if isinstance(pairs, str) and not all("=" in pair for pair in pairs.split(",")):
        bare = next(pair for pair in pairs.split(",") if "=" not in pair)
        raise ValueError(
            f"`optim_args` is {pairs!r}, with no value for {bare!r}: write `--optim_args {bare}=0.9`, say; several "
            "have commas between them."
        )


# Of options that are JSON, what they may hold.
EXAMPLES = {
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
    "model_init_kwargs": {"attn_implementation": "sdpa"},
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "chat_template_kwargs": {"enable_thinking": False},
}


def _as_json(name: str, given: str) -> str:
    """Return what to type for an option that is JSON: what was given, where that is `NAME=VALUE`, or an example."""
    pairs = dict(re.findall(r"(\w+)=([^,\s]+)", given))
    values = {key: _value_of(text) for key, text in pairs.items()} or EXAMPLES.get(name)
    return f"`--{name} {shlex.quote(json.dumps(values))}`" if values else f'`--{name} \'{{"NAME": "value"}}\'`'


def _value_of(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def read(parser: OptionParser, argv: list[str] | None = None, demo: str | None = None) -> Options:
    """
    Read the options; of the parser's defaults, the YAML recipe and the flags, the later wins. The
    recipe is the file given with `--config`; without one, and without a dataset of the user's own, it is the installed
    recipe `demo`, whose settings fit the embedded data. Its `env` is put into the environment, as TRL does.

    Raises:
        ValueError: for an unknown key or flag, with the nearest one, or a recipe that does not exist.
        SystemExit: after `--help`, or for a flag without a value.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--help_all" in argv or "--help-all" in argv:
        parser.show_all()
        argv.append("--help")
    flags = [flag for flag in argv if flag not in ("-h", "--help")]
    known, _ = parser.parse_known_args(flags)
    own_data = getattr(known, "dataset_name", None) is not None or getattr(known, "datasets", None)
    # The defaults that `--help` shows are those of a run on data of one's own.
    recipe = known.config or (None if own_data or flags != argv else demo)
    path, keys = None, []
    if recipe is not None:
        path = find_config(recipe, parser.command)
        _require_recipe_of(parser.command, path)
        keys = _apply_recipe(parser, path)
    if flags == argv:  # what `--help` shows holds on every device
        known, _ = parser.parse_known_args(flags)
        _follow_the_device(parser, known)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"{not_understood(unknown, parser, argv)} `--help_all` lists every option.")
    of_adapter = next((word.split("=")[0] for word in argv if word.startswith(("--lora_", "--lora-"))), None)
    if of_adapter is not None and not getattr(values, "use_peft", True):
        raise ValueError(
            f"`{of_adapter}` is an option of an adapter, and none is made: every weight would be trained. Add "
            "`--use_peft`, or leave it out."
        )
    if hasattr(values, "deepspeed"):
        values.deepspeed = find_deepspeed(values.deepspeed)
    is_own = path is not None and INSTALLED.resolve() not in path.resolve().parents
    return Options(parser, values, argv, path if is_own else None, keys if is_own else ())


def _require_recipe_of(command: str, path: Path) -> None:
    """Raise `ValueError` for an installed recipe of another command; the critic takes those of PPO."""
    folder = path.resolve().parent
    wanted = {"critic": ("critic", "ppo")}.get(command, (command,))
    if (
        folder.parent == INSTALLED.resolve()
        and command in RECIPES
        and folder.name in RECIPES
        and folder.name not in wanted
    ):
        name = f"{folder.name}/{path.stem}"
        own = INSTALLED / wanted[0] / path.name
        own = own if own.is_file() else min((INSTALLED / wanted[0]).glob("*.yaml"))
        raise ValueError(
            f"The recipe {name!r} is one of `trl-ext {folder.name}`: write `trl-ext {folder.name} --config {name}`, "
            f"or for this command `--config {wanted[0]}/{own.stem}`. `trl-ext recipes {wanted[0]}` lists its recipes."
        )


def _apply_recipe(parser: OptionParser, path: Path) -> list[str]:
    """
    Set the parser's defaults from a YAML mapping, and return which; a key is any name of a flag, `model` or
    `model_name_or_path`.
    """
    recipe = read_recipe(path)
    environment = recipe.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(
            f"In the recipe {path}, `env` is {environment!r}; it must hold lines `NAME: value`, "
            "indented, such as `  HF_HOME: /data/hub`."
        )
    os.environ.update({name: str(value) for name, value in environment.items()})
    options = {name: action for action in parser._actions for name in action.option_strings if not is_negation(name)}
    unknown = [key for key in recipe if f"--{key}" not in options or key in ("config", "help", "help_all")]
    sections = [key for key in unknown if isinstance(recipe[key], dict)]
    if sections:
        raise ValueError(
            f"In the recipe {path}, `{sections[0]}` holds lines of its own: a recipe has no sections. Write each "
            "`option: value` at the left margin."
        )
    if unknown:
        raise ValueError(f"In the recipe {path}: {misspelt(unknown, parser)}")
    given: dict[str, Any] = {}
    for key, value in recipe.items():
        action = options[f"--{key}"]
        if action.dest in given:
            names = [name for name in recipe if options[f"--{name}"].dest == action.dest]
            raise ValueError(
                f"The recipe {path} gives `{action.dest}` twice, as {' and as '.join(f'`{name}`' for name in names)}. "
                "Keep one of them."
            )
        try:
            given[action.dest] = recipe_value(action, value)
        except ValueError as error:
            raise ValueError(f"In the recipe {path}, `{key}` is {value!r}; {error}{_line_for(key, action)}") from error
    parser.set_defaults_with_config(**given)
    return list(given)


def _line_for(key: str, action: argparse.Action) -> str:
    """Return a line of a recipe that an option may have, in a sentence."""
    is_switch = getattr(action.type, "__name__", "") == "string_to_bool"
    value = "true" if is_switch else next(iter(action.choices)) if action.choices else action.default
    return f" For example: `{key}: {value}`." if isinstance(value, str | int | float) else ""


def recipe_value(action: argparse.Action, value: Any) -> Any:
    """Return a recipe's value as the flag would have it; `ValueError` where the flag would refuse it."""
    if action.nargs == "+" and isinstance(value, str):
        return value.split()
    if action.nargs == "+" and isinstance(value, dict):
        return [f"{new}={old}" for new, old in value.items()]
    if value is None and action.default is not None and action.type in (int, float):
        raise ValueError("it must be a number.")
    if value is None or action.nargs == "+":
        return value
    if action.choices and value not in action.choices:
        raise ValueError(f"it must be one of {', '.join(map(str, action.choices))}.")
    if action.type in (int, float):
        try:
            return action.type(str(value))
        except ValueError:
            kind = "a whole number" if action.type is int else "a number"
            raise ValueError(f"it must be {kind}.") from None
    if getattr(action.type, "__name__", "") == "string_to_bool" and not isinstance(value, bool):
        try:
            kind_of: Any = action.type
            return kind_of(str(value))
        except argparse.ArgumentTypeError:
            raise ValueError("it must be true or false.") from None
    return value


def _follow_the_device(parser: OptionParser, known: argparse.Namespace) -> None:
    """Set the defaults that TRL and transformers would choose as if there were a GPU."""
    use_cpu = getattr(known, "use_cpu", False)
    if use_cpu or not torch.cuda.is_available():
        parser.set_defaults(dataloader_pin_memory=False)
    if getattr(known, "bf16", False) is None:  # TRL would take bfloat16, on a CPU too
        parser.set_defaults(bf16=not known.fp16 and computes_in_bf16(use_cpu))
