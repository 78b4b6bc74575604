"""docs/datasets.md: its Python runs from top to bottom, its error is the one that is raised, its table holds."""

import re

import pytest
from datasets import Dataset

from dataset_rows import EXAMPLES, PAIRS, dataset
from doc_examples import ROOT, examples, run
from trl_ext.data.conversions import to_preference, to_prompts
from trl_ext.data.formats import describe, require


PAGE = "docs/datasets.md"


def test_python_of_the_page_runs_from_top_to_bottom():
    names: dict = {}
    for example in examples(PAGE):
        names |= run(example, {}, names)
    assert len(names["pairs"]) == 2


def test_error_on_the_page_is_the_one_that_is_raised():
    shown = re.search(r"```\nValueError: (.*?)```", (ROOT / PAGE).read_text(), flags=re.DOTALL).group(1)
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
    text = (ROOT / PAGE).read_text()
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
