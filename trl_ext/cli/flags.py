"""Parse the flags of commands with few options, in both spellings, and hint at what a misspelt one was to be."""

import argparse
import contextlib
import difflib
import re
import sys
from typing import Any, NoReturn

from .older_names import what_it_is_today


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
    message = re.sub(r"^argument ([\w-]+)(/[\w/-]+)?: ", r"`\1`: ", message)
    message = message.replace("expected one argument", f"it needs a value{_example(action)}.")
    message = message.replace("expected at least one argument", "it needs one value or more.")
    message = re.sub(r"Truthy value expected: got (.*?) but .*", r"'\1' is neither True nor False.", message)
    print(f"error: {re.sub(r'invalid (int|float) value: (.*)', _no_number, message)}", file=sys.stderr)
    raise SystemExit(2)


def _is_required(action: argparse.Action) -> bool:
    return action.required


def _shown(action: argparse.Action) -> str:
    """Return an argument as a command line has it, `ADAPTER` or `--output_dir DIR`."""
    value = str(action.metavar or action.dest.upper())
    return f"{action.option_strings[0]} {value}" if action.option_strings else value


def _example(action: argparse.Action | None) -> str:
    if action is None or action.type not in (int, float):
        return ""
    kind = "a whole number" if action.type is int else "a number"
    return f", {kind}" if action.default is None else f", {kind} such as {action.default}"


def require_choice(action: argparse.Action, value: Any) -> None:
    """Raise argparse's error for a value that is none of the choices, with the nearest; many are not listed."""
    if action.choices is None or value in action.choices:
        return
    choices = [str(choice) for choice in action.choices]
    near = difflib.get_close_matches(str(value), choices, n=1)
    listed = ", ".join(choices) if len(choices) <= MOST_CHOICES else f"{len(choices)}, which `--help_all` lists"
    meant = f" Did you mean {near[0]}?" if near else ""
    raise argparse.ArgumentError(action, f"invalid choice: {value!r}.{meant} It may be one of {listed}.")


def _no_number(match: re.Match) -> str:
    text = f"{match[2]} is no {'whole ' if match[1] == 'int' else ''}number."
    with contextlib.suppress(ValueError, OverflowError):
        number = float(match[2].strip("'"))
        return f"{text} Write {int(number)}." if number.is_integer() else text
    if re.fullmatch(r"'-?\d+,\d+(e-?\d+)?'", match[2]):
        return f"{text} Write {match[2].strip(chr(39)).replace(',', '.')}."
    return text


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
        require_choice(action, value)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        values, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise SystemExit(f"error: {not_understood(unknown, self)} `--help` lists every option.")
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


def not_understood(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """Return a sentence for each word of a command line that is no option, or for the first that belongs to none."""
    options = [word for word in unknown if word.startswith("-")]
    if options:
        return misspelt(options, parser)
    word = unknown[0]
    name, sign, value = word.partition("=")
    known = {each.lstrip("-") for action in parser._actions for each in spellings(action)}
    if name in known:
        return f"`{word}` lacks the two dashes of an option: write `--{name}{f' {value}' if sign else ''}`."
    for option in ("config", "from_config"):
        if option in known and ("/" in word or word.endswith((".yaml", ".yml"))):
            return f"`{word}` belongs to no option. If it is a recipe, write `--{option} {word}`."
    return f"`{word}` belongs to no option. Write `--NAME {word}`, or quote a value that holds spaces."


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
