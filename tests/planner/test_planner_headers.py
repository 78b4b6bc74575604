"""The memory that a recipe's header names is what the planner says when it is asked as the header says."""

import re
import shlex
from pathlib import Path

import pytest

from commands import command


ROOT = Path(__file__).parents[2]
HEADER = re.compile(r"^# Memory: +(.+), planned by\n# +(trl-ext plan .+)$", flags=re.MULTILINE)
RECIPES = [path for room in ("ppo", "dpo") for path in sorted((ROOT / "configs" / room).glob("*.yaml"))]
PLANNED = {path: HEADER.search(path.read_text()) for path in RECIPES}


@pytest.fixture(scope="module")
def plan():
    return command("plan")


def test_recipes_for_hardware_name_their_memory():
    without = {path.stem for path, header in PLANNED.items() if header is None}
    assert without == {"demo", "documents"}  # which have been run, and which are for no hardware in particular


@pytest.mark.filterwarnings("ignore")  # of transformers and TRL, about options of the recipe
@pytest.mark.parametrize(
    "path", [path for path in RECIPES if PLANNED[path]], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_header_says_what_the_planner_says(path, plan, capsys, monkeypatch):
    figure, line = PLANNED[path].groups()
    assert f"--from-config {path.relative_to(ROOT)}" in line
    monkeypatch.chdir(ROOT)
    plan.main(shlex.split(line)[2:])
    said = capsys.readouterr().out
    assert "It fits" in said
    numbers = re.findall(r"\d+\.\d|\d+(?= GiB of host)", figure)
    assert numbers
    for number in numbers:
        assert re.search(rf"\b{re.escape(number)} of ", said), number


@pytest.mark.parametrize(
    ("recipe", "message"), [("configs/ppo/none.yaml", "There is no file"), ("README.md", "say which it is")]
)
def test_recipe_that_is_none_is_named(recipe, message, plan):
    with pytest.raises(SystemExit, match=message):
        plan.main(["--from-config", str(ROOT / recipe)])
