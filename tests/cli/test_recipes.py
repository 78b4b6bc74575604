"""Recipes: where they are found, and what each says of itself."""

import json
import re
from pathlib import Path

import pytest

from cli_runs import RECIPES
from commands import ROOT, command
from trl_ext.cli.recipes import INSTALLED, find_config


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_configs_are_installed_with_the_package():
    """What the wheel holds beside the code is what is in configs/."""
    files = sorted(path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.*"))
    assert files == sorted(path.relative_to(INSTALLED) for path in INSTALLED.rglob("*.*"))
    assert len(files) > 25
    globs = re.search(r"^trl_ext = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE).group(1)
    packaged = {path for glob in json.loads(globs) for path in (ROOT / "trl_ext").glob(glob)}
    assert {INSTALLED / file for file in files} <= packaged


@pytest.mark.parametrize(
    ("name", "folder", "file"),
    [
        ("configs/dpo/demo.yaml", "", "dpo/demo.yaml"),
        ("dpo/demo.yaml", "", "dpo/demo.yaml"),
        ("dpo/demo", "", "dpo/demo.yaml"),
        ("8b_qlora_24gb", "ppo", "ppo/8b_qlora_24gb.yaml"),
        ("zero3", "accelerate", "accelerate/zero3.yaml"),
        ("zero3", "deepspeed", "deepspeed/zero3.json"),
    ],
)
def test_installed_file_is_found_from_any_folder(name, folder, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name, folder) == INSTALLED / file


def test_own_file_goes_before_an_installed_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dpo").mkdir()
    Path("dpo/demo.yaml").write_text("beta: 1\n")
    assert find_config("dpo/demo.yaml") == Path("dpo/demo.yaml")
    with pytest.raises(ValueError, match=r"There is no file /nowhere/dpo/demo\.yaml"):
        find_config("/nowhere/dpo/demo.yaml")


def test_recipe_outside_a_checkout_finds_its_deepspeed_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = command("ppo").COMMAND.options(["--config", "ppo/33b_full_offload"])
    assert given.deepspeed == str(INSTALLED / "deepspeed" / "ppo_33b_4x80g.json")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_recipe_says_what_it_is_for(path):
    head = path.read_text().split("\n\n")[0]
    for entry in ("Hardware:", "Launch:"):
        assert entry in head
    assert "Expected:" in head or "Measured:" in head
    assert "@" not in head
