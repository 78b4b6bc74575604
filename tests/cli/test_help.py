"""What `--help` shows first, by topic and in full, and what a misspelt option is told."""

import dataclasses
import re

import pytest

from cli_runs import TRAINING, error_of
from trl_ext.cli import topics
from trl_ext.cli.commands import plan
from trl_ext.cli.main import main
from trl_ext.planner import Layout


# Of TRL, transformers and torch themselves, on the way through whole commands.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def help_of(name, capsys, option="--help"):
    main([name, option])  # torchrun's `record` takes an exit without an error for a return
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["reward", "ppo", "dpo", "score"])
def test_help_begins_with_the_ten_options_that_matter(name, capsys):
    text = help_of(name, capsys)
    first = re.search(r"^The 10 options that matter first:\n((?:  .*\n)+)", text, flags=re.MULTILINE).group(1)
    shown = re.findall(r"^  (?:--model_name_or_path, )?--(\w+)", first, flags=re.MULTILINE)
    assert shown == topics.FIRST[name].split()
    headings = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert headings[0] == "The 10 options that matter first"
    assert headings[-1] == "options"  # --help itself
    assert len(headings) >= 5
    assert not [heading for heading in headings if heading.startswith("More options of")]
    every = help_of(name, capsys, "--help_all")
    assert len(every.splitlines()) > len(text.splitlines())
    assert every == help_of(name, capsys, "--help-all")


def test_every_topic_has_options_that_a_command_shows(capsys):
    shown = set()
    for name in TRAINING:
        shown |= set(re.findall(r"^  (?:--model_name_or_path, )?--(\w+)", help_of(name, capsys), flags=re.MULTILINE))
    named = {option for names in topics.TOPICS.values() for option in names.split()} - {"model_name_or_path"}
    assert named <= shown


def test_help_shows_the_defaults_of_own_data(capsys):
    text = help_of("ppo", capsys)
    assert re.search(r"--response_length INT .*\(default: 53\)", text)
    main(["ppo", "--help", "--config", "ppo/demo"])
    assert re.search(r"--response_length INT .*\(default: 12\)", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["dpo", "--lerning_rate", "1"], "there is no option `--lerning_rate`; did you mean `--learning_rate`?"),
        (["ppo", "--kl-coeff=1"], "there is no option `--kl-coeff`; did you mean `--kl_coef`?"),
        (["reward", "--xyzzyx"], "there is no option `--xyzzyx`. `--help_all` lists every option."),
        (["dpo", "--beta", "-1"], "`beta` is -1.0"),
        (
            ["ppo", "--config", "ppo/dmeo"],
            "There is no file ppo/dmeo, here or among the installed ones, such as ppo/demo",
        ),
    ],
)
def test_option_that_is_wrong_ends_the_command_with_one_sentence(arguments, said, capsys):
    message = error_of(arguments, capsys)
    assert message.startswith("error: ")
    assert said in message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--gpuss", "4"], "there is no option `--gpuss`; did you mean `--gpus`?"),
        (["plan", "--model", "nosuch"], "'nosuch' is no folder or hub name"),
        (["report", "out", "--wach", "3"], "there is no option `--wach`; did you mean `--watch`?"),
        (["chat", "out", "--temprature", "1"], "did you mean `--temperature`?"),
        (["demo", "--output-dri", "x"], "did you mean `--output_dir`?"),
    ],
)
def test_commands_with_few_options_say_what_was_meant_too(arguments, said, capsys):
    assert said in error_of(arguments, capsys)


def test_plan_takes_both_spellings_and_explains_its_layout(capsys):
    main(["plan", "--from-config", "dpo/8b_qlora_24gb", "--gpu-memory", "24", "--no-gradient-checkpointing"])
    first = capsys.readouterr().out
    main(["plan", "--from_config=dpo/8b_qlora_24gb", "--gpu_memory=24", "--no-gradient_checkpointing"])
    assert capsys.readouterr().out == first
    text = help_of("plan", capsys)
    first = re.search(r"^The 10 options that matter first:\n((?:  .*\n)+)", text, flags=re.MULTILINE).group(1)
    assert len(re.findall(r"^  --\w+", first, flags=re.MULTILINE)) == 10
    assert set(plan.LAYOUT_TEXTS) == {field.name for field in dataclasses.fields(Layout)}
