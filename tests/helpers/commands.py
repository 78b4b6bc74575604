"""The command line in the tests' own process: a command's module, and a line as people type it."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from trl_ext.cli.main import COMMANDS


ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("scripts", "benchmarks", "experiments")
A_SCRIPT = rf"python (?:{'|'.join(FOLDERS)})/"
LINE = re.compile(rf"(?:trl(?:-ext)? (?P<command>\w+)|{A_SCRIPT}(?P<script>\w+)\.py)(?: .*)?")


def command(name: str) -> ModuleType:
    """`trl_ext/cli/commands/<name>.py`."""
    return importlib.import_module(f"trl_ext.cli.commands.{name}")


def build(name: str, words: list[str]) -> Any:
    """The trainer of a training command with these words behind it."""
    training = command(name).COMMAND
    return training.build(*training.options(words).make())


def script(name: str) -> ModuleType:
    """`<name>.py` of `scripts/`, `benchmarks/` or `experiments/`; as when it is run, it can import its neighbours."""
    (path,) = (path for room in FOLDERS for path in (ROOT / room).glob(f"{name}.py"))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


def name_in(line: str) -> str:
    """The command or script of `trl-ext dpo …` or `python scripts/dpo.py …`."""
    match = LINE.fullmatch(line)
    assert match, f"{line} is neither `trl-ext COMMAND …` nor `python scripts/NAME.py …`"
    return match["command"] or match["script"]


def run(line: str, *more: str) -> None:
    """The line by its own `main`, with the words `more` behind it."""
    name = name_in(line)
    if line.startswith("trl "):  # TRL's own; its command would start accelerate, which starts this
        own = importlib.import_module(f"trl.scripts.{name}")
        own.main(*own.make_parser().parse_args_and_config([*shlex.split(line)[2:], *more]))
        return
    module = command(name) if name in COMMANDS else script(name)
    module.main([*shlex.split(line)[2:], *more])
