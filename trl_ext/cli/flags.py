"""Parse the flags of commands with few options, in both spellings, and hint at what a misspelt one was to be."""

import argparse
import contextlib
import difflib
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from ..runs.folder import DATA_FILES
from .older_names import what_it_is_today
from .recipes import is_recipe


WIDTH = 119  # columns of a help text
MOST_CHOICES = 16  # that an error lists


# argparse's numbers have no exponent: it would take -1e-5 for an option.
NEGATIVE_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def end_in_one_line(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Exit with argparse's message in one line, without the usage."""
    if message.startswith("the following arguments are required: "):
        message = (
            f"arguments are missing: `{parser.prog} {' '.join(map(_shown, filter(_is_required, parser._actions)))}`."
        )
    named = re.match(r"argument ([\w-]+)", message)
    action = parser._option_string_actions.get(named[1]) if named else None
    message = re.sub(r"^argument (-[\w-]+)(/[\w/-]+)?: ", r"`\1`: ", message)
    message = re.sub(r"^argument (\w+): ", "", message)  # one by its place
    message = message.replace("expected one argument", f"it needs a value.{_example(action)}")
    message = message.replace("expected at least one argument", f"it needs one value or more.{_example(action)}")
    either = f"Write `{named[1]} True` or `{named[1]} False`." if named else ""
    message = re.sub(r"Truthy value expected: got (.*?) but .*", rf"'\1' is neither True nor False. {either}", message)
    message = re.sub(r"invalid (int|float) value: (.*)", lambda match: f"{_no_number(match, action)}", message)
    print(f"error: {message.strip()}", file=sys.stderr)
    raise SystemExit(2)


def _is_required(action: argparse.Action) -> bool:
    return action.required


def _shown(action: argparse.Action) -> str:
    """Return an argument as a command line has it, `ADAPTER` or `--output_dir DIR`."""
    value = str(action.metavar or action.dest.upper())
    return f"{action.option_strings[0]} {value}" if action.option_strings else value


def _example(action: argparse.Action | None) -> str:
    """Return what can be typed: a choice, or the default."""
    if action is None:
        return ""
    value = action.default
    if value is None and action.choices and len([*action.choices]) <= MOST_CHOICES:
        return f" It may be one of {', '.join(map(str, action.choices))}."
    if value in (None, argparse.SUPPRESS, []) or isinstance(value, bool):
        kinds: dict[Any, str] = {int: " It is a whole number.", float: " It is a number."}
        return kinds.get(action.type, "")
    words = shlex.join(map(str, value if isinstance(value, list) else [value]))
    return f" For example: `{action.option_strings[0]} {words}`."


def require_choice(prog: str, action: argparse.Action, value: Any) -> None:
    """Raise argparse's error for a value that is none of the choices, with the nearest; many are not listed."""
    if action.choices is None or value in action.choices:
        return
    choices = [str(choice) for choice in action.choices]
    near = difflib.get_close_matches(str(value), choices, n=1)
    listed = ", ".join(choices) if len(choices) <= MOST_CHOICES else f"{len(choices)}, which `--help_all` lists"
    before = action.option_strings[0] if action.option_strings else prog
    usual = action.default if action.option_strings else choices[0]  # unset, it may depend on other options
    example = f" For example: `{before} {usual}`." if usual in action.choices else ""
    meant = f" Did you mean `{before} {near[0]}`?" if near else example
    raise argparse.ArgumentError(action, f"{value!r} is no choice.{meant} It may be one of {listed}.")


def _no_number(match: re.Match, action: argparse.Action | None) -> str:
    given, flag = match[2].strip("'"), action.option_strings[0] if action and action.option_strings else ""
    text = f"{match[2]} is no {'whole ' if match[1] == 'int' else ''}number."
    with contextlib.suppress(ValueError, OverflowError):
        number = float(given)
        whole = int(number) if number.is_integer() else round(number)
        return f"{text} Write `{flag} {whole}`."
    if re.fullmatch(r"-?\d+,\d+(e-?\d+)?", given):
        return f"{text} Write `{flag} {given.replace(',', '.')}`."
    return f"{text}{_example(action)}"


class CommandParser(argparse.ArgumentParser):
    """`argparse` for commands with few options: takes hyphens for underscores and hints at what was meant."""

    def __init__(self, command: str, description: str | None):
        super().__init__(
            f"trl-ext {command}", description=description, formatter_class=HelpFormatter, allow_abbrev=False
        )
        self._negative_number_matcher = NEGATIVE_NUMBER

    def error(self, message: str) -> NoReturn:
        end_in_one_line(self, message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        require_choice(self.prog, action, value)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        values, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise SystemExit(f"error: {not_understood(unknown, self, words)} `--help` lists every option.")
        return values


def _with_underscores(word: str) -> str:
    """Return a flag in the spelling that is known: `--from_config` for `--from-config`; argparse's `--no-suggest`."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    start = "--no-" if is_negation(name) else "--"
    return start + name[len(start) :].replace("-", "_") + sign + value


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Show one name per option (`--max_steps INT`), although argparse knows its hyphens too, and no empty defaults."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, []) else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {self._format_args(action, str(action.metavar or 'VALUE'))}"
        return ", ".join(spellings(action)) + value


def not_understood(unknown: list[str], parser: argparse.ArgumentParser, argv: list[str]) -> str:
    """Return a sentence for each word of `argv` that is no option, or for the first that belongs to none."""
    options = [word for word in unknown if word.startswith("-")]
    if options:
        return misspelt(options, parser)
    word = unknown[0]
    name, sign, value = word.partition("=")
    known = {each.lstrip("-") for action in parser._actions for each in spellings(action)}
    if name in known:
        return f"`{word}` lacks the two dashes of an option: write `--{name}{f' {value}' if sign else ''}`."
    kinds = {
        "recipe": (("config", "from_config"), word.endswith((".yaml", ".yml")) or is_recipe(word)),
        "dataset": (("dataset_name",), Path(word).suffix in DATA_FILES),
        "model": (("model",), Path(word).is_dir() or "/" in word or "dataset_name" not in known),
    }
    for kind, (names, is_likely) in kinds.items():
        option = next((each for each in names if each in known), None)
        if option is not None and is_likely:
            return f"`{word}` belongs to no option. If it is a {kind}, write `--{option} {word}`."
    at = argv.index(word)
    start = max((i for i in range(at) if argv[i].startswith("--")), default=None)
    flag, values = ("--NAME", [word]) if start is None else (argv[start], [*argv[start + 1 : at], word])
    following = next((i for i in range(at, len(argv)) if argv[i].startswith("-")), len(argv))
    whole = shlex.join([flag, " ".join([*values, *argv[at + 1 : following]])])
    return f"`{word}` belongs to no option. Quote a value that holds spaces: `{whole}`, or leave it out."


def misspelt(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """Return a sentence for each unknown option, or word: what it is called today, or else the nearest option."""
    known = [name.lstrip("-") for action in parser._actions for name in spellings(action)]
    sentences = []
    for word in unknown:
        dashes = "--" if word.startswith("-") else ""
        wanted = word.split("=")[0].lstrip("-").replace("-", "_")
        meant = what_it_is_today(wanted, set(known)) or getattr(parser, "cures", {}).get(wanted)
        if meant is None:
            near = difflib.get_close_matches(wanted, known, n=1, cutoff=0.6)
            ending = f"; did you mean `{dashes}{near[0]}`?" if near else "."
        else:  # names of options in the spelling of the line, a flag's or a recipe's
            named = re.sub("`(?=[a-z_0-9]+`)", f"`{dashes}", meant)
            ending = f"; {named}."
        sentences.append(f"there is no option `{word.split('=')[0]}`{ending}")
    return " ".join(sentences)


def spellings(action: argparse.Action) -> list[str]:
    """Return the names of an option, without the second spelling with hyphens."""
    return [name for name in action.option_strings if "-" not in name.removeprefix("--") or name == "-h"]


def is_negation(name: str) -> bool:
    """Return whether a flag is argparse's `--no_x` of an option that is on by default."""
    return name.startswith(("--no_", "--no-"))
