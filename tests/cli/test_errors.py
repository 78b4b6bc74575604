"""Ordinary mistakes: each is told in one line what to change, and docs/errors.md shows it."""

import re
import shlex

import pytest

from trl_ext.cli.errors import DEBUG
from trl_ext.cli.main import main
from wrong_lines import PAGE, escaped, lines, page, said_to, words_of, workplace


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    workplace(folder)
    return folder


@pytest.mark.parametrize("line", [line for _, line in lines()])
def test_mistake_is_told_in_one_line_as_on_the_page(line, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv(DEBUG, raising=False)
    said = said_to(line)
    assert said.startswith("error: ")
    assert f"`trl-ext {line}`\n\n> {escaped(said)}\n" in PAGE.read_text(encoding="utf-8")


# The option that a line gives wrongly is taken out, and the last that its error has with a value is given.
MENDED = [
    "dpo … --beta 0",
    "dpo … --loss_type sigmod",
    "dpo … --lr_scheduler_type cosin",
    "ppo … --per_device_train_batch_size 64",
    "dpo … --model my-sfft",
    "dpo … --use_peft --lora_target_modules q_prj",
    "dpo … --dataset_name pair.jsonl",
    "dpo … --dataset_name good.csv",
    "dpo … --dataset_name good.csv --columns good_answer=chosen bad_answer=rejected",
    "dpo … --dataset_name ab.csv",
    "dpo … --dataset_train_split trian",
    "ppo … --reward_funcs my_functoins.py:short",
    "dpo … --output_dir pairs.jsonl",
]


@pytest.mark.parametrize("line", MENDED)
def test_what_a_mistake_is_told_to_type_is_taken(line, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    said = said_to(line)
    option, *values = shlex.split(re.findall(r"`(--\w+ [^`]+)`", said)[-1])
    kept, is_wrong = [], False
    for word in words_of(line):
        is_wrong = word == option if word.startswith("--") else is_wrong
        kept += [] if is_wrong else [word]
    main([*kept, option, *values, "--dry_run"])
    assert "This was a dry run" in capsys.readouterr().out


def test_page_has_these_mistakes_alone():
    text = PAGE.read_text(encoding="utf-8")
    told = {line: f"{{{i}}}" for i, (_, line) in enumerate(lines())}
    of_page = [line for line in text.splitlines() if not line.startswith("> ")]
    assert of_page == [line for line in page(told).splitlines() if not line.startswith("> ")]
    assert len(told) >= 60
