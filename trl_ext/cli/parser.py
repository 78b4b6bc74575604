"""Parse the options of commands that train or score, by topic."""

import argparse
import inspect
import re
from collections.abc import Iterable
from dataclasses import Field, fields
from importlib import import_module
from typing import Any, NoReturn, get_type_hints

from trl import TrlParser

from ..ppo.config_checks import MEANINGLESS_IN_PPO
from .flags import NEGATIVE_NUMBER, WIDTH, HelpFormatter, end_in_one_line, is_negation, require_choice
from .topics import ABSENT, first_of, heading_of, order, text_of, topic_of


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    return import_module(f".commands.{command}", __package__).arguments()


class OptionParser(TrlParser):
    """`TrlParser` with its options grouped by topic, and the rare ones hidden from `--help`."""

    def __init__(self, command: str, dataclasses: Iterable[type], **kwargs: Any):
        self.command = command
        self.hints: dict[str, Any] = {}  # the annotation of each option
        self.cures = MEANINGLESS_IN_PPO if command in ("ppo", "critic") else {}  # of options that it does not have
        self._hidden: dict[argparse.Action, str | None] = {}
        self._headings: dict[str, Any] = {}
        usage = "%(prog)s [options]"
        prog = f"trl-ext {command}" if command else None
        super().__init__(
            list(dataclasses), formatter_class=HelpFormatter, usage=usage, prog=prog, allow_abbrev=False, **kwargs
        )
        self._negative_number_matcher = NEGATIVE_NUMBER
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

    def error(self, message: str) -> NoReturn:
        end_in_one_line(self, message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        require_choice(self.prog, action, value)

    def show_all(self) -> None:
        for action, text in self._hidden.items():
            action.help = text

    def help_of(self, action: argparse.Action) -> str:
        """Return the text of an option, whether it is shown or not."""
        return (self._hidden.get(action, action.help) or "").replace("%%", "%")

    def _group(self, heading: str) -> Any:
        if heading not in self._headings:
            self._headings[heading] = self.add_argument_group(heading)
        return self._headings[heading]

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """Add options as the parent does, by topic; as a dataclass, a topic has the fields of its last base first."""
        absent = ABSENT.get(self.command, "").split()
        hints = get_type_hints(dtype)
        self.hints |= hints
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
            if kind == "string_to_bool" and action.nargs is None:  # of `bool | None`; others take no value as True
                action.nargs, action.const = "?", True
            action.metavar = {"int": "INT", "float": "FLOAT", "str": "TEXT", "string_to_bool": "BOOL"}.get(kind)
            choices = "{" + ",".join(map(str, action.choices or [])) + "}"
            if action.choices:
                action.metavar = choices if len(choices) < WIDTH else "TEXT"  # of the optimizers there are forty
            if not shown or is_negation(action.option_strings[0]):
                self._hidden[action], action.help = action.help, argparse.SUPPRESS
