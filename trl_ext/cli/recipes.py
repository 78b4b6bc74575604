"""Find and read the files of `configs/`: a checkout's, the user's own, and those installed with the package."""

import difflib
import json
from pathlib import Path
from typing import Any

import yaml


INSTALLED = Path(__file__).resolve().parents[1] / "configs"


def find_config(name: str | Path, folder: str = "") -> Path:
    """
    Return the path of a recipe, an accelerate file or a DeepSpeed file: a path, or the name of an installed one such
    as `dpo/demo`, or zero3 in the `folder` accelerate. `ValueError` when there is none, with the nearest names.
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
    names = [str(file.relative_to(INSTALLED)) for file in sorted((INSTALLED / folder).rglob("*.*"))]
    near = difflib.get_close_matches(str(installed), names, n=3, cutoff=0.4) or names
    raise ValueError(f"There is no file {name}, here or among the installed ones, such as {', '.join(near)}.")


def read_recipe(path: Path) -> dict[str, Any]:
    """Return option names and values; raise `ValueError` unless the file is YAML of `option: value` lines."""
    recipe = read_yaml(path, "recipe")
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} holds a {type(recipe).__name__}; it must hold `option: value` lines.")
    return recipe


def find_deepspeed(given: Any) -> Any:
    """Return the path of a DeepSpeed file, which may be an installed one, or what else is given; `ValueError` if it is
    broken."""
    if not (isinstance(given, str) and given.endswith(".json")):
        return given
    path = find_config(given, "deepspeed")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The DeepSpeed file {path} is no JSON: {error}") from error
    return str(path)


def read_yaml(path: Path, what: str) -> Any:
    """Return the content of a YAML file, `{}` if it is empty; raise `ValueError`, which calls it `what`."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The {what} {path} is no YAML: {' '.join(str(error).split())}") from error
