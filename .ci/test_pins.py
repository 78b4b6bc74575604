"""
The installed environment against constraints.txt: what is pinned and installed is of the pinned version.

A check of the maintainers' pins, a part of `make check` and not of the tests: what is not pinned, such as the CUDA
libraries that torch brings on some machines, is nobody's mistake.
"""

import importlib.metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version


CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def pins() -> list[Requirement]:
    lines = [line.split("#")[0].strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    return [Requirement(line) for line in lines if line]


def other_versions(pinned: list[Requirement]) -> list[str]:
    """What is pinned, installed and of another version; a build for this machine (+cpu, +cu130) is no other one."""
    found = []
    for pin in pinned:
        try:
            installed = Version(importlib.metadata.version(pin.name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if not pin.specifier.contains(installed.public, prereleases=True):
            found.append(f"{pin.name} {installed}, pinned {pin.specifier}")
    return found


def test_what_is_pinned_and_installed_has_the_pinned_version():
    assert not other_versions(pins()), "run `make setup`"


@pytest.mark.parametrize(
    ("pin", "differs"), [("torch=={}", False), ("torch==0.1", True), ("nosuch==1.0", False), ("pip==0.1", True)]
)
def test_control_another_version_is_found_and_another_build_is_not(pin, differs):
    version = Version(importlib.metadata.version("torch")).public
    assert bool(other_versions([Requirement(pin.format(version))])) == differs
