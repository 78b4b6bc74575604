"""Say an error of the package in a command's words: options as they are typed, data by their name."""

import argparse
import ast
import json
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.folder import DATA_FILES


# What a trainer takes in Python -> the option of a command that stands for it.
OPTION_OF = {"reward_model": "reward_model_path", "peft_config": "use_peft", "ref_model_path": "ref_model"}
NO_OPTIONS = ("config", "help", "help_all")  # names that mean something else in an error
PART_OF = {"dataset": "", "train_dataset": "the training split of ", "eval_dataset": "the test split of "}

NAMED = re.compile(r"`(\w+)(?:=([^`]+))?`")  # an option in an error: `beta` or `beta=0.1`
FOR_PYTHON = re.compile(r",? in Python `[^`]*`")  # beside what can be typed
CODE_ON_ROWS = re.compile(r"`([^`]*\bdataset\b[^`]*\([^`]*)`")
OUT_OF_RANGE = re.compile(r"`(?:--)?(\w+)` is [^`]*; it must be [^`]*\.")


@dataclass(frozen=True)
class Wording:
    """The words of a command that was given options and data."""

    parser: argparse.ArgumentParser
    data: str | None = None  # of `--dataset_name`
    is_renamed: bool = False  # whether `--columns` gives the columns other names
    recipe: Path | None = None  # the user's own
    from_recipe: Collection[str] = ()  # destinations of the options that it sets and no flag does

    def __call__(self, text: str) -> str:
        """
        Return an error of the package as a command says it: `` `beta=0.1` `` is `` `--beta 0.1` ``, or the line
        `` `beta: 0.1` `` of the recipe that sets it; a dataset is the file that it was read from; and what can be
        typed stands alone, without its form in Python.
        """
        first = NAMED.search(text)
        is_of_recipe = first is not None and self._is_from_recipe(self._action(first[1]))
        text = CODE_ON_ROWS.sub(self._command, FOR_PYTHON.sub("", text))
        text = NAMED.sub(lambda match: self._named(match), text)
        whole = OUT_OF_RANGE.fullmatch(text)
        if whole:
            text = text.replace("or unset", "or left out") + self._example(whole[1])
        return f"In the recipe {self.recipe}: {text}" if is_of_recipe else text

    def option(self, name: str, value: Any = None) -> str:
        """Return an option with a value as a command line or the recipe has it."""
        action = self._action(name)
        if self._is_from_recipe(action):
            return f"`{name}: {json.dumps(value) if isinstance(value, dict) else value}`"
        values = (
            value if isinstance(value, list | tuple) else [json.dumps(value) if isinstance(value, dict) else value]
        )
        return f"`--{OPTION_OF.get(name, name)} {shlex.join(map(str, values))}`"

    def _action(self, name: str) -> argparse.Action | None:
        known = self.parser._option_string_actions
        return None if name in NO_OPTIONS else known.get(f"--{name}", known.get(f"--{OPTION_OF.get(name)}"))

    def _is_from_recipe(self, action: argparse.Action | None) -> bool:
        return action is not None and action.dest in self.from_recipe

    def _named(self, match: re.Match) -> str:
        name, value = match[1], match[2]
        if name in PART_OF and value is None:
            begins = match.start() == 0 or match.string[: match.start()].endswith(". ")
            named = f"{PART_OF[name]}{repr(self.data) if self.data else 'the data'}"
            return named[0].upper() + named[1:] if begins else named
        action = self._action(name)
        if action is None:
            return match[0]
        if value is not None:
            return self.option(name, _literal(value))
        return f"`{name}`" if self._is_from_recipe(action) else f"`--{OPTION_OF.get(name, name)}`"

    def _example(self, name: str) -> str:
        """Return the default of an option as an example of what it may be."""
        action = self._action(name)
        if action is None or action.default in (None, argparse.SUPPRESS) or self._is_from_recipe(action):
            return ""
        return f" For example: {self.option(name, action.default)}."

    def _command(self, match: re.Match) -> str:
        """Return the command that applies code to the rows of the file, and the flag for what it writes."""
        path, code = Path(self.data or ""), match[1]
        kind = DATA_FILES.get(path.suffix.lower())
        if kind is None or not path.is_file() or self.is_renamed or re.search(r'["$\\!]', code):
            return match[0]
        new = free_beside(path)
        imports = "import trl_ext.data.conversions; " if "trl_ext." in code else ""
        program = (
            f"{imports}from datasets import load_dataset; dataset = load_dataset('{kind}', data_files={str(path)!r}, "
            f"split='train'); {code}.to_{kind}({new!r})"
        )
        return f'`python -c "{program}"`, and give `--dataset_name {shlex.quote(new)}`'


def free_beside(path: Path, ending: str | None = None) -> str:
    """Return the name of a file beside another one that does not exist yet: rows-2.jsonl."""
    number = 2
    while (free := path.with_name(f"{path.stem}-{number}{ending or path.suffix}")).exists():
        number += 1
    return str(free)


def _literal(value: str) -> Any:
    """Return what a text is in Python; a bare word itself."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
