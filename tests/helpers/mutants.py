"""
Mutants: known mistakes that a test must notice, so that it is known to be able to fail.

A mutant is a module built from its own source with one piece of text replaced. While it stands in for the real module,
the test, taken as it is from its file, must fail.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def name(mutant: tuple) -> str:
    module, text, mistake, *_ = mutant
    return f"{module}: {text.strip()} -> {mistake}"


def find_test(path: Path, beginning: str) -> tuple[Callable[..., None], ModuleType]:
    """The one test of the file whose name begins like this, and its module, imported anew."""
    spec = importlib.util.spec_from_file_location(f"mutated_{path.stem}", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    (test,) = (function for name, function in vars(tests).items() if name.startswith(f"test_{beginning}"))
    return test, tests


def mutate(module: ModuleType, text: str, mistake: str) -> ModuleType:
    """The module that results from writing `mistake` for `text`, which its source must hold."""
    source = inspect.getsource(module)
    assert text in source, f"{text!r} is no longer in {module.__name__}: bring the table up to date."
    mutant = ModuleType(module.__name__)
    mutant.__package__ = module.__package__
    exec(compile(source.replace(text, mistake), f"mutant of {module.__file__}", "exec"), mutant.__dict__)
    return mutant


def loaded_helpers() -> list[ModuleType]:
    folder = str(Path(__file__).parent)
    return [module for module in list(sys.modules.values()) if str(getattr(module, "__file__", "")).startswith(folder)]


def assert_caught(
    module: ModuleType,
    text: str,
    mistake: str,
    test: Callable[..., None],
    tests: ModuleType,
    parameters: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test passes, and fails once the mutant stands in for the module."""
    test(**parameters)
    for attribute, value in vars(mutate(module, text, mistake)).items():
        if not attribute.startswith("__"):
            # Also where the test's file, or one of the helpers, has imported it by name.
            for user in (tests, *loaded_helpers()):
                if attribute in vars(user) and getattr(user, attribute) is getattr(module, attribute):
                    monkeypatch.setattr(user, attribute, value)
            monkeypatch.setattr(module, attribute, value)
    with pytest.raises((AssertionError, pytest.fail.Exception, IndexError, RuntimeError, ValueError)):
        test(**parameters)
