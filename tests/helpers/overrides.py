"""What our trainers take from the private side of their parents: the methods they override, the state they touch."""

import ast
import inspect
import re
from pathlib import Path

import trl_ext


TRAINERS = ("PPOTrainerX", "DPOTrainerX", "RewardTrainerX")
PACKAGE = Path(trl_ext.__file__).parent
# Trainer -> the folder whose files read and write its attributes.
ROOMS = {"PPOTrainerX": "ppo", "DPOTrainerX": "dpo", "RewardTrainerX": "reward"}


def classes(name: str) -> tuple[list[type], list[type]]:
    """The classes of a trainer, ours and those that they stand on."""
    ancestry = [one for one in getattr(trl_ext, name).__mro__ if one is not object]
    return [one for one in ancestry if one.__module__.startswith("trl_ext")], [
        one for one in ancestry if not one.__module__.startswith("trl_ext")
    ]


def overridden(name: str) -> dict[str, tuple[inspect.Signature, inspect.Signature]]:
    """Methods of a trainer that a parent has too, with our signature and the parent's."""
    ours, parents = classes(name)
    found = {}
    for one in ours:
        for method, value in vars(one).items():
            if inspect.isfunction(value) and method != "__init__":
                parent = next((getattr(other, method) for other in parents if hasattr(other, method)), None)
                if parent is not None:
                    found[method] = inspect.signature(value), inspect.signature(parent)
    return found


def touched(name: str) -> set[str]:
    """Private attributes of a trainer that its room reads or writes and that are the parents' own."""
    _, parents = classes(name)
    sources = "".join(inspect.getsource(one) for one in parents if one.__module__.startswith(("trl", "transformers")))
    of_parents = set(re.findall(r"self\.(_[a-z]\w*)", sources)) | {name for one in parents for name in vars(one)}
    read = set()
    for path in (PACKAGE / ROOMS[name]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in ("self", "trainer") and re.match(r"_[a-z]", node.attr):
                    read.add(node.attr)
    return (read & of_parents) - overridden(name).keys()
