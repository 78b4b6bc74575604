"""
List the recipes that come with the package: what each is for, on which hardware, and what to expect of it.

    trl-ext recipes                 # all of them
    trl-ext recipes ppo dpo         # those of two commands
    trl-ext recipes --json          # for programs
    trl-ext recipes --schema .      # schemas, by which editors complete and check recipes

A recipe starts by its name, `trl-ext ppo --config ppo/demo`; flags override it. To write your own, start from a copy
of the file that is named last.
"""

import difflib
import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from ..errors import usage_errors
from ..flags import CommandParser
from ..recipes import RECIPES, Recipe, installed_recipes


def arguments() -> CommandParser:
    parser = CommandParser("recipes", __doc__)
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"whose recipes: {', '.join(RECIPES)}")
    parser.add_argument("--json", action="store_true", default=None, help="print a list of objects")
    schema = "write recipe-COMMAND.schema.json for each command into a folder, of the installed versions"
    parser.add_argument("--schema", type=Path, metavar="DIR", help=schema)
    return parser


def main(argv: list[str] | None = None) -> None:
    given = arguments().parse_args(argv)
    with usage_errors():
        commands = given.commands or list(RECIPES)
        unknown = [command for command in commands if command not in RECIPES]
        if unknown:
            raise ValueError(
                f"There are no recipes of {unknown[0]!r}: write `trl-ext recipes` for all, or with one or more of "
                f"{', '.join(RECIPES)}, such as `trl-ext recipes {near_command(unknown[0])}`."
            )
        if given.schema is not None:
            return write_schemas(given.schema, commands)
    recipes = installed_recipes(*commands)
    print(json.dumps([asdict(each) for each in recipes], indent=2) if given.json else "\n\n".join(map(text, recipes)))


def near_command(word: str) -> str:
    """Return the command with recipes whose name is like a word, or the first."""
    return (difflib.get_close_matches(word, RECIPES, n=1) or RECIPES)[0]


def text(recipe: Recipe) -> str:
    """Return a recipe in words, for a terminal."""
    said = {
        "hardware": recipe.hardware,
        "memory": recipe.memory,
        "expected": recipe.expected,
        "file": recipe.path,
    }
    parts = [recipe.name, _wrapped("", recipe.purpose)]
    parts += [_wrapped(name, words) for name, words in said.items() if words is not None]
    return "\n".join(parts)


def _wrapped(name: str, words: str) -> str:
    first, others = (f"  {name:10}", " " * 12) if name else ("  ", "  ")
    return textwrap.fill(words, 100, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)


def write_schemas(folder: Path, commands: list[str]) -> None:
    """Write the schema of each command's recipes into a folder; `ValueError` if nothing can be written there."""
    from ...runs.requirements import make_folder  # late, with what follows: a list need not wait for torch
    from ..schema import schema_of

    make_folder(folder, "--schema")
    for command in commands:
        path = folder / f"recipe-{command}.schema.json"
        path.write_text(json.dumps(schema_of(command), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{path}: begin a recipe of {command} with\n  # yaml-language-server: $schema={path.name}")
