"""Find and read the files of `configs/`: a checkout's, the user's own, and those installed with the package."""

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


INSTALLED = Path(__file__).resolve().parents[1] / "configs"


RECIPES = ("ppo", "critic", "dpo", "reward")  # the folders of recipes, and the commands that take them


@dataclass(frozen=True)
class Recipe:
    """An installed recipe, as the comment at its head describes it; `expected` is what it brings, in what time."""

    name: str  # "ppo/demo"
    purpose: str
    hardware: str
    memory: str | None
    expected: str
    launch: str
    path: str


def installed_recipes(*folders: str) -> list[Recipe]:
    """Return the recipes of these folders, or of all."""
    return [recipe_of(path) for folder in folders or RECIPES for path in sorted((INSTALLED / folder).glob("*.yaml"))]


def recipe_of(path: Path) -> Recipe:
    """Read the head of a recipe: its purpose, then `Name: text` lines, whose text may go on in indented lines."""
    head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
    lines = [line.removeprefix("#").removeprefix(" ") for line in (head[0] if head else "").splitlines()]
    purpose = " ".join(lines[: lines.index("")])
    said: dict[str, list[str]] = {}
    for line in lines[lines.index("") :]:
        if match := re.match(r"([A-Z][a-z]+): +(.*)", line):
            said[match[1]] = [match[2]]
        elif said and line.startswith(" "):
            said[[*said][-1]].append(line.strip())
        elif line:
            said[line] = []  # a paragraph ends what was said before
    texts = {name: " ".join(parts) for name, parts in said.items()}
    return Recipe(
        name=f"{path.parent.name}/{path.stem}",
        purpose=purpose,
        hardware=texts["Hardware"],
        memory=texts["Memory"].split(", planned by")[0] if "Memory" in texts else None,
        expected=texts.get("Expected") or texts["Measured"],
        launch="\n".join(said["Launch"]),
        path=str(path),
    )


def is_recipe(name: str) -> bool:
    """Return whether a word looks like the name of an installed recipe: `ppo/demo`."""
    return name.removeprefix("configs/").split("/")[0] in RECIPES and "/" in name


def find_config(name: str | Path, folder: str = "", option: str = "--config") -> Path:
    """
    Return the path of a recipe, an accelerate file or a DeepSpeed file: a path, or the name of an installed one such
    as `dpo/demo`, or zero3 in the `folder` accelerate. `ValueError` when there is none, with what to give as `option`.
    """
    path = Path(name)
    if path.is_file():
        return path
    installed = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    for candidate in (INSTALLED / installed, INSTALLED / folder / installed):
        for ending in ("", ".yaml", ".json"):
            file = candidate.with_name(candidate.name + ending)
            if not path.is_absolute() and file.is_file():
                return file
    files = [file for room in ([folder] if folder else RECIPES) for file in sorted((INSTALLED / room).glob("*.*"))]
    root = INSTALLED if folder in ("", *RECIPES) else INSTALLED / folder
    names = [str(file.relative_to(root).with_suffix("")) for file in files]
    near = difflib.get_close_matches(str(installed.with_suffix("")), names, n=3, cutoff=0.4)
    first, *others = near or names[:3]
    meant = f"Did you mean `{option} {first}`?" if near else f"For example: `{option} {first}`."
    more = f" Others: {', '.join(others)}." if others else ""
    listed = " `trl-ext recipes` lists all." if folder in ("", *RECIPES) else ""
    raise ValueError(f"There is no file {str(name)!r}, here or among the installed ones. {meant}{more}{listed}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Return option names and values; raise `ValueError` unless the file is YAML of `option: value` lines."""
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        what, meant = f"one value ({recipe!r:.40})", "such as `learning_rate: 1e-6`"
        if isinstance(recipe, list):
            what = f"a list, whose first item is `- {recipe[0]}`"
            meant = f"without dashes before them, {meant}"
        elif isinstance(recipe, str) and len(recipe.split()) == 2:
            meant = f"with a colon: `{': '.join(recipe.split())}`"
        raise ValueError(f"The recipe {path} holds {what}; it must hold lines `option: value`, {meant}.")
    return recipe


def find_deepspeed(given: Any) -> Any:
    """
    Return the path of a DeepSpeed file, which may be an installed one such as zero3, or what else is given;
    `ValueError` if it is broken.
    """
    is_name = isinstance(given, str) and re.fullmatch(r"[\w./-]+", given) is not None
    if not is_name or not (given.endswith(".json") or (INSTALLED / "deepspeed" / f"{given}.json").is_file()):
        return given
    path = find_config(given, "deepspeed", "--deepspeed")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The DeepSpeed file {path} is no JSON: {error}") from error
    return str(path)


def _require_once(node: Any, path: Path, what: str) -> None:
    """Raise `ValueError` for a key that a mapping has twice: YAML would take the last in silence."""
    lines: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(
                f"The {what} {path} has `{key.value}` twice, in lines {lines[key.value]} and {line}. Keep one."
            )
        lines[key.value] = line


# What the YAML parser says -> what to do.
OF_YAML = {
    "'\\t'": "it begins with a tab. Write it without: options begin at the left margin, and what belongs to one "
    "behind spaces",
    "expected ',' or ']'": "a bracket is open. Close it with `]`, or leave `[` out where there is one value",
    "expected ',' or '}'": "a brace is open. Close it with `}`",
    "end of stream": "a quote is open. Close it",
    "mapping values are not allowed": "there is a colon too many. Put a value with a colon in quotes",
}


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file, `{}` if it is empty; raise `ValueError`, which calls it `what`."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        _require_once(yaml.compose(text), path, what)
        return content
    except yaml.MarkedYAMLError as error:
        # An open bracket is missed where the next line or the end of the file comes: the mistake is where it begins.
        at = error.context_mark or error.problem_mark
        lines = text.splitlines()
        number = len(lines) if at is None else min(at.line + 1, len(lines))
        said = str(error.problem).split(", but got")[0]
        said = next((cure for problem, cure in OF_YAML.items() if problem in said), said)
        raise ValueError(
            f"The {what} {path} is no YAML: in line {number}, `{lines[number - 1].strip():.60}`, {said}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The {what} {path} is no YAML: {' '.join(str(error).split())}") from error
