"""docs/datasets.md: its error is the one that is raised, its table holds."""

import re
from pathlib import Path

import pytest
from datasets import Dataset

from dataset_rows import EXAMPLES, PAIRS, dataset
from trl_ext.data.conversions import to_preference, to_prompts
from trl_ext.data.formats import describe, require


PAGE = Path(__file__).parents[2] / "docs" / "datasets.md"


def test_error_on_the_page_is_the_one_that_is_raised():
    shown = re.search(r"```\nValueError: (.*?)```", PAGE.read_text(), flags=re.DOTALL).group(1)
    with pytest.raises(ValueError, match="has no column") as error:
        require(dataset(PAIRS), "preference", "train_dataset")
    assert " ".join(str(error.value).split()) == " ".join(shown.split())


def reads(convert, row):
    try:
        convert(Dataset.from_list([row, row | {"completion": "no", "label": False}] if "label" in row else [row]))
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name, row", [(name, row) for name, row in EXAMPLES if name is not None])
def test_table_of_formats_says_what_each_trainer_can_be_given(name, row):
    """A format with "no" cannot be converted, with "by" it must be, with anything else it is read as it is."""
    text = PAGE.read_text()
    heading = {
        "tokenised prompts": "tokenised prompts (TRL 1.12's PPO)",
        "language modeling": "language modeling, text",
        "language modeling, conversations": "language modeling",
        "language modeling, ShareGPT": "language modeling",
    }.get(name, name)
    of_pairs, of_prompts = re.search(
        rf"^\| {re.escape(heading)} \| .* \| (.*) \| (.*) \|$", text, re.MULTILINE
    ).groups()
    if isinstance(row.get("completion"), list):
        return  # the made-up second answer is text
    for said, convert, task in ((of_pairs, to_preference, "preference"), (of_prompts, to_prompts, "prompts")):
        assert reads(convert, row) is not said.startswith("no"), (name, task)
        assert reads(lambda rows, task=task: require(rows, task), row) is not said.startswith(("no", "by")), (
            name,
            task,
        )
    assert describe(dataset(row)).name == name
