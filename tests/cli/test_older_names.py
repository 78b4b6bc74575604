"""Options of other times and packages: the error says what they are today, and that is true."""

import re

import pytest

from cli_runs import TRAINING, error_of
from commands import command
from trl_ext.cli.main import main
from trl_ext.cli.older_names import NAMES_BEFORE, OTHER_VALUES, TODAY, WITHOUT_OPTION


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def known():
    """Command -> the names of its options."""
    parsers = {name: command(name).COMMAND.options(["--dataset_name", "x"]).parser for name in TRAINING}
    return {
        name: {word.lstrip("-") for action in parser._actions for word in action.option_strings}
        for name, parser in parsers.items()
    }


def test_every_name_of_today_is_an_option_and_no_older_one_is_everywhere(known):
    of_any = set.union(*known.values()) | {"ref_model", "output_file"}  # those two of `trl-ext score`
    assert set(NAMES_BEFORE) <= of_any
    everywhere = set.intersection(*known.values())
    assert not everywhere & (set(TODAY) | set(WITHOUT_OPTION))
    assert set(OTHER_VALUES) <= set(TODAY)
    for text in (*OTHER_VALUES.values(), *WITHOUT_OPTION.values()):
        assert set(re.findall(r"`([a-z_0-9]+)`", text)) <= of_any


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("dpo --max_prompt_length 5", "`--max_prompt_length`; today it is `--max_length` (it holds for prompt and"),
        ("ppo --max_prompt_length 5", "`--max_prompt_length`; leave it out: prompts are never cut"),
        ("dpo --torch_dtype auto", "`--torch_dtype`; today it is `--dtype`."),
        ("ppo --torch-dtype auto", "`--torch-dtype`; today it is `--dtype`."),
        ("reward --lora_rank 8", "`--lora_rank`; today it is `--lora_r`."),
        ("ppo --gae_lambda 0.9", "`--gae_lambda`; today it is `--lam`."),
        ("ppo --max_new_tokens 9", "`--max_new_tokens`; today it is `--response_length`."),
        ("dpo --max_new_tokens 9", "`--max_new_tokens`; today it is `--eval_max_new_tokens`."),
        ("ppo --mini_batch_size 9", "today it is `--num_mini_batches` (the number of mini-batches in a rollout)."),
        ("dpo --prefix_sharing false", "`--prefix_sharing`; today it is `--packing`."),
        ("dpo --warmup_ratio 0.1", "today it is `--warmup_steps` (a value below 1 is a share of the steps)."),
        ("dpo --quantization_bit 4", "today it is `--load_in_4bit` (for 8 bits `--load_in_8bit`)."),
        ("dpo --ref_model_path x", "the reference is the model that training starts from"),
        ("dpo --logging_dir x", "set the environment variable TENSORBOARD_LOGGING_DIR"),
        ("dpo --learning_rat 1", "did you mean `--learning_rate`?"),
        ("dpo --xyzzy_plugh 1", "there is no option `--xyzzy_plugh`. `--help_all`"),
    ],
)
def test_older_flag_is_told_its_name_of_today(line, said, capsys):
    assert said in error_of(line.split(), capsys)


def test_older_key_of_a_recipe_is_told_its_name_of_today(tmp_path):
    (tmp_path / "r.yaml").write_text("torch_dtype: auto\nquantization_bit: 4\n")
    said = "no option `torch_dtype`; today it is `dtype`. .*`quantization_bit`; today it is `load_in_4bit`"
    with pytest.raises(SystemExit, match=said):
        main(["dpo", "--config", str(tmp_path / "r.yaml")])
