"""
Mistakes, so that it is known that a test can fail: one makes another function of a function. While that stands in
wherever the right one was imported, the test, taken as it is from its file, must fail.
"""

import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


Function = Callable[..., Any]
Mistake = Callable[[Function], Function]


def negated(function: Function) -> Function:
    return lambda *args, **kwargs: -function(*args, **kwargs)


def doubled(function: Function) -> Function:
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


def swapped(function: Function) -> Function:
    """Its first two arguments change places."""
    return lambda one, other, *args, **kwargs: function(other, one, *args, **kwargs)


def given(**changes: Function) -> Mistake:
    """The mistake of another argument: by its name, what becomes of it."""

    def mistake(function: Function) -> Function:
        signature = inspect.signature(function)

        def mistaken(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            bound.arguments |= {name: change(bound.arguments[name]) for name, change in changes.items()}
            return function(*bound.args, **bound.kwargs)

        return mistaken

    return mistake


def to(value: Any) -> Function:
    """The change of an argument, whatever it was, to this one."""
    return lambda _: value


def instead(mistaken: Function) -> Mistake:
    """The mistake of another function, whatever the right one does."""
    return lambda function: mistaken


def find_test(path: Path, beginning: str) -> tuple[Function, ModuleType]:
    """The one test of the file whose name begins like this, and its module, imported anew."""
    spec = importlib.util.spec_from_file_location(f"mistaken_{path.stem}", path)
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
    (test,) = (function for name, function in vars(tests).items() if name.startswith(f"test_{beginning}"))
    return test, tests


def stand_in(target: str, mistake: Mistake, monkeypatch: pytest.MonkeyPatch, *users: ModuleType) -> None:
    """Puts a mistake in the place of "module:function" or "module:Class.method", in the package and its users."""
    module, _, path = target.partition(":")
    place, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{place}")
    function = getattr(owner, name)
    mistaken = mistake(function)
    monkeypatch.setattr(owner, name, mistaken)
    loaded = [module for known, module in list(sys.modules.items()) if known.startswith("trl_ext")]
    for module in [*loaded, *users]:
        for its_name, value in list(vars(module).items()):
            if value is function:
                monkeypatch.setattr(module, its_name, mistaken)
            elif isinstance(value, dict) and not its_name.startswith("__"):  # a table of functions by name
                for key in [key for key, one in value.items() if one is function]:
                    monkeypatch.setitem(value, key, mistaken)


def assert_noticed(
    path: Path, beginning: str, parameters: dict[str, Any], target: str, mistake: Mistake, monkeypatch, **fixtures: Any
) -> None:
    """The test passes, and fails while the mistake stands in; of the fixtures it gets those that it names."""
    test, tests = find_test(path, beginning)
    fixtures["monkeypatch"] = monkeypatch
    named = inspect.signature(test).parameters.keys() & fixtures.keys()
    parameters = parameters | {name: fixtures[name] for name in named}
    test(**parameters)
    stand_in(target, mistake, monkeypatch, tests)
    with pytest.raises((AssertionError, pytest.fail.Exception, IndexError, RuntimeError, ValueError)):
        test(**parameters)
