"""Make the JSON schema of a command's recipes, draft 7, which editors of YAML read."""

import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from .flags import is_negation, spellings
from .parser import OptionParser, parser_of


ENV = {
    "description": "Environment variables that the run sets.",
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}


def schema_of(command: str) -> dict[str, Any]:
    """Return the schema of the recipes of `command`: every option, with its help, its kinds of values, its default."""
    parser = parser_of(command)
    assert isinstance(parser, OptionParser)
    properties = {"env": ENV}
    for action in parser._actions:
        if action.dest not in ("config", "help", "help_all") and not is_negation(action.option_strings[0]):
            names = [name.removeprefix("--") for name in spellings(action)]
            properties |= dict.fromkeys(names, _property(action, parser.hints[action.dest], parser.help_of(action)))
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": f"A recipe of trl-ext {command}",
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }


def _property(action: Any, hint: Any, text: str) -> dict[str, Any]:
    kinds = _kinds(hint) | ({"null"} if action.default is None else set())
    said: dict[str, Any] = {"description": text}
    if action.nargs == "+":
        of = get_args(hint)[0] if get_origin(hint) is list else next(iter(_lists(hint)))
        said |= {"type": sorted(kinds | {"array", "string"}), "items": _items(of)}
        if action.dest == "columns":  # new: old
            said["type"].append("object")
    elif action.choices:
        said["enum"] = [*action.choices, *([None] if "null" in kinds else [])]
    elif kinds - {"null"}:
        said["type"] = sorted(kinds)
    if isinstance(action.default, bool | int | float | str | list) and action.default != []:
        said["default"] = action.default
    return said


def _lists(hint: Any) -> Any:
    """The kinds of elements of the list in a union."""
    return (get_args(each)[0] for each in get_args(hint) if get_origin(each) is list)


def _items(hint: Any) -> dict[str, Any]:
    kinds = _kinds(hint)
    return {"type": sorted(kinds)} if kinds else {"type": "object"}  # a dataclass, as in `datasets`


def _kinds(hint: Any) -> set[str]:
    """Return the kinds of JSON values that an annotation allows; none if it says nothing of them."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    if origin is Literal:
        return set().union(*(_kinds(type(value)) for value in get_args(hint)))
    kind = origin or hint
    if kind is type(None):
        return {"null"}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"string"}
    return {KINDS[kind]} if kind in KINDS else set()
