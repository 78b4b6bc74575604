"""Names, versions, pins and documented commands agree with each other."""

import ast
import importlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import overrides
import trl_ext


ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]

# The name that is imported, where it is not the name of the distribution.
DISTRIBUTIONS = {"yaml": "pyyaml"}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def declared(*groups: str) -> dict[str, Requirement]:
    """Requirements by canonical name: the package's own, and those of the extras named."""
    lines = list(PROJECT["dependencies"])
    for group in groups:
        lines += PROJECT["optional-dependencies"][group]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def pins(path: str = "constraints.txt") -> dict[str, Requirement]:
    lines = [line.split("#")[0].strip() for line in read(path).splitlines()]
    return {canonicalize_name(pin.name): pin for pin in map(Requirement, filter(None, lines))}


def pinned_version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")


def fenced_commands(markdown: str) -> list[str]:
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", markdown, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def make_targets(text: str) -> set[str]:
    """Targets that a text tells the reader to call: `make test`, or `make check test proof` in code."""
    code = fenced_commands(text) + re.findall(r"`([^`\n]+)`", text)
    calls = [call for line in code for call in re.findall(r"\bmake((?: [\w=./\"'-]+)+)", line)]
    return {word for call in calls for word in call.split() if re.fullmatch(r"[a-z][a-z-]*", word)}


# --- the package


@pytest.mark.parametrize("name", trl_ext.__all__)
def test_public_name_exists_and_has_a_docstring(name):
    value = getattr(trl_ext, name)
    if inspect.isclass(value) or callable(value):
        # A dataclass without a docstring gets its signature as one: that documents nothing.
        docstring = value.__doc__ or ""
        assert docstring.strip(), f"trl_ext.{name} has no docstring"
        assert not docstring.startswith(f"{name}("), f"trl_ext.{name} has the docstring that dataclass made up"


@pytest.mark.parametrize("name", overrides.TRAINERS)
def test_docstring_names_what_the_trainer_overrides(name):
    docstring = inspect.getdoc(getattr(trl_ext, name))
    (paragraph,) = re.findall(r"Overridden.*?(?=\n\n)", docstring, flags=re.DOTALL)
    named = {name for name in re.findall(r"`(\w+)`", paragraph) if not name.startswith(("Writes", "Saves"))}
    assert overrides.overridden(name).keys() <= named
    assert docstring.splitlines()[0][0] != " "
    assert "import" not in docstring


ROOMS = "data models packing runs ppo ppo/ahead ppo/roles dpo reward planner report callbacks cli".split()


@pytest.mark.parametrize("room", ROOMS)
def test_docstring_of_a_room_lists_its_files(room):
    folder = ROOT / "trl_ext" / room
    listed = re.findall(r"^    (\w+)  +\S", (folder / "__init__.py").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))


def test_every_module_with_content_has_a_docstring():
    for path in [*(ROOT / "trl_ext").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not tree.body or ast.get_docstring(tree), f"{path} has no docstring"


def test_imports_are_declared_dependencies():
    """What a module imports at its top is installed with the package; the report may also use its extra."""
    for path in (ROOT / "trl_ext").rglob("*.py"):
        extras = ["report"] if (ROOT / "trl_ext" / "report") in path.parents else []
        allowed = set(declared(*extras))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top != "trl_ext":
                    name = canonicalize_name(DISTRIBUTIONS.get(top, top))
                    assert name in allowed, f"{path} imports {top}, which pyproject.toml does not declare"


# --- pyproject.toml, constraints.txt, CHANGELOG.md


def test_project_metadata_is_what_users_install():
    assert PROJECT["name"] == "trl-ext"
    assert PROJECT["requires-python"] == ">=3.11"
    assert PROJECT["license"] == "Apache-2.0"
    assert str(declared()["trl"].specifier) in (">=1.16,<1.17", "<1.17,>=1.16")
    extras = {"deepspeed", "demo", "docs", "qlora", "report", "tensorboard", "trackio", "dev"}
    assert set(PROJECT["optional-dependencies"]) == extras
    assert importlib.metadata.version("trl-ext") == trl_ext.__version__


def test_changelog_opens_with_the_current_version():
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), flags=re.MULTILINE).group(1) == trl_ext.__version__


def test_constraints_pin_every_dependency():
    pinned = pins()
    for pin in pinned.values():
        assert re.fullmatch(r"==[^*,+]+", str(pin.specifier)), f"{pin} is no exact public version"
    for name, requirement in declared(*PROJECT["optional-dependencies"]).items():
        assert name in pinned, f"{name} is not pinned in constraints.txt"
        version = pinned_version(pinned[name])
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes the pin {version}"


def test_oldest_constraints_are_the_lower_bounds():
    """`make test-oldest` runs on what pyproject.toml promises; two more hold back what the oldest cannot stand."""
    bounds = {}
    for name, requirement in declared(*PROJECT["optional-dependencies"]).items():
        (bounds[name],) = (Version(each.version) for each in requirement.specifier if each.operator == ">=")
    oldest = {name: Version(pinned_version(pin)) for name, pin in pins("constraints-oldest.txt").items()}
    assert oldest.pop("click")
    assert oldest.pop("pyparsing")
    assert oldest == bounds


# --- scripts, README.md, CONTRIBUTING.md, Makefile, CI


def test_readme_opens_with_the_two_commands():
    assert fenced_commands(read("README.md"))[:2] == ["make demo", "make test"]


def test_makefile_can_be_read_and_names_every_target_in_its_help():
    printed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"^  make (\S+)", printed, flags=re.M)) == set(
        re.findall(r"^([a-z-]+):.*##", read("Makefile"), flags=re.M)
    )


def test_ci_calls_what_the_readme_names():
    assert read(".ci/run").splitlines()[-1] == "make check test proof"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run is not executable"


def test_versions_of_this_machine_are_checked_by_make_check_alone():
    """What else a platform brings, such as torch's CUDA libraries, must not fail the tests of the product."""
    of_check, of_test = (
        re.search(rf"^{target}: .*\n((?:\t.*\n)+)", read("Makefile"), flags=re.MULTILINE).group(1)
        for target in ("check", "test")
    )
    assert ".ci/test_pins.py" in of_check
    assert ".ci" not in of_test
    assert PYPROJECT["tool"]["pytest"]["ini_options"]["testpaths"] == ["tests"]


@pytest.mark.parametrize(
    "path", ["README.md", "CONTRIBUTING.md", ".ci/run", ".pre-commit-config.yaml", "pyproject.toml"]
)
def test_documented_make_target_exists(path):
    text = read(path)
    existing = set(re.findall(r"^([a-z-]+):", read("Makefile"), flags=re.MULTILINE))
    named = make_targets(text) if path.endswith(".md") else make_targets(f"```bash\n{text}```")
    if path.endswith(".md"):
        assert named, f"{path} names no make target: the pattern of this test has gone stale"
    assert named <= existing


def test_control_make_targets_are_found():
    text = 'Run `make no-such`, make sure it passes.\n```bash\nmake check test ARGS="-k gae" # make nothing\n```\n'
    assert make_targets(text) == {"no-such", "check", "test"}
