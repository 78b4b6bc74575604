"""The layers of docs/architecture.md: which file may import what, in functions and under `TYPE_CHECKING` too."""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from layers import PUBLIC_MODULES, PURE, PURE_MODULES, ROOT


# What stands above the trainers: they run, or look at, what the trainers do.
ABOVE_THE_TRAINERS = {"trl_ext.callbacks", "trl_ext.cli", "trl_ext.data.demo", "trl_ext.planner", "trl_ext.report"}
# A room of a trainer -> one that it never reaches.
ROOMS = {"trl_ext/ppo": "trl_ext.dpo", "trl_ext/dpo": "trl_ext.ppo", "trl_ext/reward": "trl_ext.ppo"}


class Import(NamedTuple):
    module: str  # absolute: "trl_ext.ppo.kl"
    name: str  # what is taken from it; "" for `import module`
    line: int

    def __str__(self) -> str:
        return f"line {self.line}: {self.module}{'.' if self.name else ''}{self.name}"

    def is_from(self, package: str) -> bool:
        return self.module == package or self.module.startswith(package + ".")


def read_imports(path: Path, root: Path = ROOT) -> list[Import]:
    """Every import of a file, relative ones resolved; `from package import module` counts as importing the module."""
    package = list(path.relative_to(root).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(parents + ([node.module] if node.module else []))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = _exists(root, inner)
                found.append(Import(inner, "", node.lineno) if is_module else Import(module, alias.name, node.lineno))
    return found


def _exists(root: Path, module: str) -> bool:
    path = root.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def impure(imported: Import) -> bool:
    """Not for a pure file."""
    top = imported.module.split(".")[0]
    is_torch = top == "torch" and "distributed" not in f"{imported.module}.{imported.name}".split(".")
    return not (is_torch or top in sys.stdlib_module_names or imported.module in PURE_MODULES)


def beyond_public(imported: Import) -> bool:
    """Of `trl_ext`, and not for a script."""
    is_public = imported.module in PUBLIC_MODULES and not _is_private(imported.name)
    return imported.is_from("trl_ext") and not is_public


def of_a_trainer(imported: Import) -> bool:
    """A trainer, or what only trainers need."""
    return (
        imported.is_from("trl")
        or imported.module == "trl_ext._trl"
        or imported.module.endswith("trainer")
        or bool(re.search(r"Trainer(X)?$", imported.name))
    )


def above_the_trainers(imported: Import) -> bool:
    """What a trainer's room would look up to."""
    return any(imported.is_from(module) for module in ABOVE_THE_TRAINERS)


def of_a_callback(imported: Import) -> bool:
    return imported.is_from("trl_ext.callbacks")


def broken(rule: Callable[[Import], bool], path: Path, root: Path = ROOT) -> list[Import]:
    """The imports of a file that a rule does not allow."""
    return [imported for imported in read_imports(path, root) if rule(imported)]


def private_trl(path: Path, root: Path = ROOT) -> list[Import]:
    """Imports and uses of TRL beyond the public names of its top level: a module inside it, or a name with a _."""
    found = [
        imported
        for imported in read_imports(path, root)
        if imported.module.startswith("trl.")
        or (imported.module == "trl" and imported.name and not _is_public_trl_name(imported.name))
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trl":
            if not _is_public_trl_name(node.attr):
                found.append(Import("trl", node.attr, node.lineno))
    return found


def _is_public_trl_name(name: str) -> bool:
    """TRL's public names are classes and functions; modules that its top level shows, such as `models`, are not."""
    import trl

    folder = Path(trl.__file__).parent
    return not _is_private(name) and not (folder / name).is_dir() and not (folder / f"{name}.py").is_file()


def import_cycles(root: Path = ROOT) -> list[str]:
    """Cycles among the modules of `trl_ext`, each written as "a -> b -> a"; each is found at least once."""
    graph = {}
    for path in python_files("trl_ext", root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        graph[module] = {i.module for i in read_imports(path, root) if i.is_from("trl_ext")} - {module}

    done: set[str] = set()

    def walk(module: str, trail: list[str]) -> Iterator[str]:
        if module in trail:
            yield " -> ".join([*trail[trail.index(module) :], module])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                yield from walk(imported, [*trail, module])
            done.add(module)

    return [cycle for module in sorted(graph) for cycle in walk(module, [])]


def python_files(folder: str, root: Path = ROOT) -> list[Path]:
    return sorted((root / folder).rglob("*.py"))


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


ROOMS_THAT_READ = ("trl_ext/report", "trl_ext/callbacks", "trl_ext/planner")
# Rule -> the files that it is for.
RULES = {
    impure: [f"trl_ext/{path}" for path in PURE],
    beyond_public: names(python_files("scripts")),
    of_a_trainer: names([path for room in ROOMS_THAT_READ for path in python_files(room)]),
    of_a_callback: names(python_files("trl_ext/report")),
}


@pytest.mark.parametrize("rule, path", [(rule, path) for rule, paths in RULES.items() for path in paths])
def test_file_imports_nothing_that_its_room_forbids(rule, path):
    assert broken(rule, ROOT / path) == []


@pytest.mark.parametrize("path", names([*python_files("trl_ext"), *python_files("scripts")]))
def test_trl_private_names_stay_in_one_file(path):
    if path != "trl_ext/_trl.py":
        assert private_trl(ROOT / path) == []


def reached(start: str, root: Path = ROOT) -> dict[str, str]:
    """Return every module of `trl_ext` that importing `start` imports, however far, each with one that imports it."""
    found, todo = {start: ""}, [start]
    while todo:
        module = todo.pop()
        path = root.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for imported in read_imports(path, root):
            # The top's names load their modules when they are first asked for.
            if imported.is_from("trl_ext") and imported.module not in found and imported.module != "trl_ext":
                found[imported.module] = module
                todo.append(imported.module)
    return found


@pytest.mark.parametrize("path", names([path for room in ROOMS for path in python_files(room)]))
def test_trainers_room_reaches_neither_the_other_nor_anything_above_it(path):
    module = ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")
    other = next(other for room, other in ROOMS.items() if path.startswith(room))
    forbidden = (other, *ABOVE_THE_TRAINERS)
    found = reached(module)
    assert not [f"{found[one]} -> {one}" for one in found if one.startswith(tuple(f"{top}." for top in forbidden))]
    assert not found.keys() & set(forbidden)


def test_control_an_import_through_a_third_file_is_reached(tmp_path):
    for name, text in {"a": "from .b import x", "b": "def f():\n    from . import c", "c": ""}.items():
        (tmp_path / "trl_ext").mkdir(exist_ok=True)
        (tmp_path / "trl_ext" / f"{name}.py").write_text(text, encoding="utf-8")
    assert reached("trl_ext.a", tmp_path) == {"trl_ext.a": "", "trl_ext.b": "trl_ext.a", "trl_ext.c": "trl_ext.b"}


def test_imports_have_no_cycle():
    assert import_cycles() == []


def test_the_rooms_are_where_the_rules_look():
    """A renamed folder would leave the tests above with nothing to check."""
    assert (ROOT / "trl_ext" / "_trl.py").is_file()
    for folder in ("trl_ext/callbacks", "trl_ext/dpo", "trl_ext/planner", "trl_ext/ppo", "trl_ext/report", "scripts"):
        assert python_files(folder), f"no Python file under {folder}"


# The control: a file that breaks each rule is caught, and its lawful neighbour is not.
@pytest.mark.parametrize(
    "rule, path, lawful, violation",
    [
        (impure, "trl_ext/ppo/kl.py", "from ..masked import masked_mean", "from transformers import Trainer"),
        (impure, "trl_ext/ppo/kl.py", "import math, torch.nn.functional", "import numpy as np"),
        (impure, "trl_ext/ppo/kl.py", "from torch import nn", "from torch import distributed"),
        (impure, "trl_ext/ppo/kl.py", "from .losses import clip_objective", "from .trainer import PPOTrainerX"),
        (impure, "trl_ext/masked.py", "from collections import abc", "def f():\n    from trl_ext import cli"),
        (private_trl, "trl_ext/ppo/trainer.py", "from trl import GRPOTrainer", "from trl.trainer.utils import pad"),
        (private_trl, "trl_ext/ppo/trainer.py", "import trl\ntrl.GRPOTrainer", "import trl\ntrl.trainer.utils.pad"),
        (private_trl, "trl_ext/ppo/trainer.py", "from trl import __version__", "from trl import _compat"),
        (private_trl, "trl_ext/ppo/trainer.py", "from .._trl import pad", "from trl import data_utils"),
        (private_trl, "trl_ext/ppo/trainer.py", "import trl", "import trl.models"),
        (beyond_public, "scripts/ppo.py", "from trl_ext import PPOTrainerX", "from trl_ext.ppo import PPOTrainerX"),
        (beyond_public, "scripts/ppo.py", "from trl_ext.data import demo", "from trl_ext import ppo"),
        (beyond_public, "scripts/ppo.py", "from trl_ext.cli.main import main", "from trl_ext.cli.main import _main"),
        (of_a_trainer, "trl_ext/report/tables.py", "import json", "from trl_ext import PPOTrainerX"),
        (
            of_a_trainer,
            "trl_ext/callbacks/report.py",
            "from transformers import TrainerCallback",
            "from trl import DPOTrainer",
        ),
        (of_a_trainer, "trl_ext/report/tables.py", "from ..masked import masked_mean", "from ..ppo import trainer"),
        (above_the_trainers, "trl_ext/ppo/trainer.py", "from . import kl", "from ..report import tables"),
        (above_the_trainers, "trl_ext/dpo/trainer.py", "import trl", "from ..callbacks import report"),
    ],
)
def test_control_a_violation_is_caught(tmp_path, rule, path, lawful, violation):
    modules = (
        "__init__ cli masked data/__init__ data/demo ppo/__init__ ppo/kl ppo/trainer report/__init__ report/tables"
    )
    for module in [*modules.split(), "callbacks/__init__"]:
        stub = tmp_path / "trl_ext" / f"{module}.py"
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text("", encoding="utf-8")
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)

    def found(text):
        file.write_text(text, encoding="utf-8")
        return private_trl(file, tmp_path) if rule is private_trl else broken(rule, file, tmp_path)

    assert found(lawful) == []
    assert len(found(f"{lawful}\n{violation}")) == 1


def test_control_a_cycle_is_caught(tmp_path):
    (tmp_path / "trl_ext").mkdir()
    (tmp_path / "trl_ext" / "a.py").write_text("from .b import x", encoding="utf-8")
    (tmp_path / "trl_ext" / "b.py").write_text("def f():\n    from trl_ext import a", encoding="utf-8")
    assert import_cycles(tmp_path) == ["trl_ext.a -> trl_ext.b -> trl_ext.a"]
