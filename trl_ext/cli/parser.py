"""Parse command lines: options by topic, in both spellings, with a hint at what a misspelt one was to be."""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import Field, fields
from typing import Any, get_type_hints

from trl import TrlParser

from .older_names import what_it_is_today
from .topics import ABSENT, first_of, heading_of, order, text_of, topic_of


WIDTH = 119  # columns of a help text


class OptionParser(TrlParser):
    """`TrlParser` with its options grouped by topic, and the rare ones hidden from `--help`."""

    def __init__(self, command: str, dataclasses: Iterable[type], **kwargs: Any):
        self.command = command
        self._hidden: dict[argparse.Action, str | None] = {}
        self._headings: dict[str, Any] = {}
        usage = "%(prog)s [options]"
        prog = f"trl-ext {command}" if command else None
        super().__init__(
            list(dataclasses), formatter_class=_HelpFormatter, usage=usage, prog=prog, allow_abbrev=False, **kwargs
        )
        first = self._group(heading_of(command)) if command else self
        first.add_argument(
            "--config", metavar="FILE.yaml", help="Recipe: a YAML file of options, overridden by flags; a path, or an "
            "installed one such as dpo/demo."
        )  # fmt: skip
        self.add_argument(
            "--help_all", "--help-all", action="store_true", default=None, help="Show every option and exit."
        )
        if command:
            names = ["config", *first_of(command)]
            first._group_actions.sort(key=lambda action: names.index(action.dest))
        self._action_groups.sort(key=lambda group: order(command, group.title or ""))

    def show_all(self) -> None:
        for action, text in self._hidden.items():
            action.help = text

    def _group(self, heading: str) -> Any:
        if heading not in self._headings:
            self._headings[heading] = self.add_argument_group(heading)
        return self._headings[heading]

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """Add options as the parent does, by topic; as a dataclass, a topic has the fields of its last base first."""
        absent = ABSENT.get(self.command, "").split()
        hints = get_type_hints(dtype)
        options = [option for option in fields(dtype) if option.init and option.name not in absent]
        owners = {o.name: next(c for c in dtype.__mro__ if o.name in inspect.get_annotations(c)) for o in options}
        for owner in reversed(dtype.__mro__):
            for option in options:
                if owners[option.name] is owner:
                    option.type = hints[option.name]
                    heading, shown = topic_of(self.command, option.name, owner)
                    self._add_option(self._group(heading), option, shown)

    def _add_option(self, group: Any, option: Field, shown: bool) -> None:
        known = len(group._group_actions)
        self._parse_dataclass_field(group, option)
        for action in group._group_actions[known:]:
            # Some of the parents' texts hold a bare "%", which argparse would take for a format.
            action.help = re.sub(r"(?<!%)%(?![%(])", "%%", text_of(self.command, action.dest) or action.help or "")
            kind = getattr(action.type, "__name__", "")
            action.metavar = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "BOOL"}.get(kind)
            choices = "{" + ",".join(map(str, action.choices or [])) + "}"
            if action.choices:
                action.metavar = choices if len(choices) < WIDTH else "TEXT"  # of the optimizers there are forty
            if not shown or is_negation(action.option_strings[0]):
                self._hidden[action], action.help = action.help, argparse.SUPPRESS


class CommandParser(argparse.ArgumentParser):
    """`argparse` for commands with few options: takes hyphens for underscores and hints at what was meant."""

    def __init__(self, command: str, description: str | None):
        super().__init__(
            f"trl-ext {command}", description=description, formatter_class=_HelpFormatter, allow_abbrev=False
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = [_with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        values, unknown = self.parse_known_args(words, namespace)
        if unknown:
            raise SystemExit(f"error: {misspelt(unknown, self)} `--help` lists every option.")
        return values


def _with_underscores(word: str) -> str:
    """Return a flag in the spelling that is known: `--from_config` for `--from-config`; argparse's `--no-suggest`."""
    if not word.startswith("--"):
        return word
    name, sign, value = word.partition("=")
    start = "--no-" if is_negation(name) else "--"
    return start + name[len(start) :].replace("-", "_") + sign + value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
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


def misspelt(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """Return a sentence for each unknown option, or word: what it is called today, or else the nearest option."""
    known = [name.lstrip("-") for action in parser._actions for name in spellings(action)]
    sentences = []
    for word in [word for word in unknown if word.startswith("-")] or unknown:
        dashes = "--" if word.startswith("-") else ""
        wanted = word.split("=")[0].lstrip("-").replace("-", "_")
        meant = what_it_is_today(wanted, set(known))
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
