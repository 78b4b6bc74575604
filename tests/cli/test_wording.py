"""What a command says of an error that Python raised: options as they are typed, data by their file."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from trl_ext.cli.parser import parser_of
from trl_ext.cli.wording import Wording


@pytest.fixture(scope="module")
def words():
    return Wording(parser_of("ppo"), data="rows.jsonl")


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("Set `cliprange` below 1.", "Set `--cliprange` below 1."),
        ("Use `kl_estimator='k2'`.", "Use `--kl_estimator k2`."),
        (
            "Give `lr_scheduler_kwargs={'min_lr_rate': 0.1}`.",
            "Give `--lr_scheduler_kwargs '{\"min_lr_rate\": 0.1}'`.",
        ),
        ("`reward_weights=[1.0, 2.0]` is it.", "`--reward_weights 1.0 2.0` is it."),
        ("It may be the `reward_model`.", "It may be the `--reward_model_path`."),
        ("`model='a b'`, in Python `model=load()`.", "`--model 'a b'`."),
        (
            "It has no `config` and no `score`; see `trl_ext.ppo`.",
            "It has no `config` and no `score`; see `trl_ext.ppo`.",
        ),
        ("`train_dataset` has rows. `dataset` too.", "The training split of 'rows.jsonl' has rows. 'rows.jsonl' too."),
        ("Row 1 of `eval_dataset`.", "Row 1 of the test split of 'rows.jsonl'."),
        (
            "`gamma` is 2; it must be from 0 to 1.",
            "`--gamma` is 2; it must be from 0 to 1. For example: `--gamma 1.0`.",
        ),
        ("`dual_clip` is 0; it must be 1, or unset.", "`--dual_clip` is 0; it must be 1, or left out."),
        ("Call `dataset.filter(f)`.", "Call `dataset.filter(f)`."),  # no such file
    ],
)
def test_options_and_data_are_said_as_they_are_typed(said, typed, words):
    assert words(said) == typed


def test_options_of_the_users_recipe_keep_its_form(words):
    own = replace(words, recipe=Path("my.yaml"), from_recipe={"gamma"})
    assert (
        own("`gamma` is 2; it must be from 0 to 1.") == "In the recipe my.yaml: `gamma` is 2; it must be from 0 to 1."
    )
    assert own("`lam=0.5` with `gamma=0.9`: keep one.") == "`--lam 0.5` with `gamma: 0.9`: keep one."


@pytest.mark.integration
def test_command_for_the_rows_writes_the_file_that_it_names(words, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "", "b")))
    said = replace(words, data=str(rows))("Drop them: `dataset.filter(lambda row: row['prompt'])`.")
    command, flag = said.split("`")[1::2]
    python, *rest = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *rest], check=True, capture_output=True)
    name, written = shlex.split(flag)
    assert name == "--dataset_name"
    assert [json.loads(line)["prompt"] for line in Path(written).read_text().splitlines()] == ["a", "b"]
    assert replace(words, data=str(rows), is_renamed=True)("`dataset.filter(f)`") == "`dataset.filter(f)`"
