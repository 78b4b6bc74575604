"""Formats of datasets: recognised, renamed, required; the error's own words lead to a dataset that can be used."""

import re

import pytest
from datasets import DatasetDict

from dataset_rows import ANSWER, EXAMPLES, PAIRS, SHAREGPT, USER, dataset, stream
from trl_ext.data.formats import (
    FORMATS,
    describe,
    parse_columns,
    rename,
    require,
    suggest_columns,
)


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize("name, row", EXAMPLES)
def test_format_is_recognised(name, row, make):
    assert describe(make(row, row)).name == name


def test_every_format_has_an_example():
    assert {name for name, _ in EXAMPLES} - {None} == set(FORMATS)


def test_columns_are_described_by_what_they_hold():
    row = {"a": "x", "b": 1, "c": 0.5, "d": True, "e": USER, "f": SHAREGPT, "g": [1], "h": ["x"], "i": None, "j": []}
    kinds = ["text", "number", "number", "true or false", "conversation", "conversation with `from` and `value`"]
    kinds += ["token ids", "list of text", "nothing", "empty list"]
    assert list(describe(dataset(row)).columns.values()) == kinds
    assert describe(dataset(row).select([])).columns["a"] == "no rows"


# --- names


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_rename_gives_new_names_and_keeps_the_rest(make):
    renamed = rename(make(PAIRS | {"source": "s"}), {"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert next(iter(renamed)) == {"prompt": "what", "chosen": "yes", "rejected": "no", "source": "s"}


def test_rename_may_exchange_names_and_may_change_nothing():
    swapped = rename(dataset({"chosen": "no", "rejected": "yes"}), {"chosen": "rejected", "rejected": "chosen"})
    assert swapped[0] == {"chosen": "yes", "rejected": "no"}
    rows = dataset(PAIRS)
    assert rename(rows, {}) is rows
    assert rename(rows, {"good": "good"}) is rows


def test_rename_reaches_every_split_and_names_the_one_that_fails():
    splits = DatasetDict(train=dataset(PAIRS), test=dataset(PAIRS))
    renamed = rename(splits, {"chosen": "good"})
    assert isinstance(renamed, DatasetDict)
    assert {name: rows[0]["chosen"] for name, rows in renamed.items()} == {"train": "yes", "test": "yes"}
    with pytest.raises(ValueError, match=r"In the split 'test': There is no column 'good' to become 'chosen'"):
        rename({"train": dataset(PAIRS), "test": dataset({"a": "x"})}, {"chosen": "good"})


def test_rename_of_a_name_that_is_not_there_suggests_the_nearest():
    found = r"the columns are 'bad', 'good', 'question'\. Did you mean `--columns prompt=question`\?"
    with pytest.raises(ValueError, match=rf"no column 'qestion' to become 'prompt'; {found}"):
        rename(dataset(PAIRS), {"prompt": "qestion"})


def test_columns_mapped_the_wrong_way_round_are_turned():
    with pytest.raises(ValueError, match=r"it is new=old, `--columns prompt=question chosen=good`; the columns are"):
        rename(dataset(PAIRS), {"question": "prompt", "good": "chosen"})
    with pytest.raises(ValueError, match="There is no column 'prompt' to become 'question'"):  # one that is right
        rename(dataset(PAIRS), {"question": "prompt", "chosen": "good"})


def test_names_that_do_not_say_which_answer_is_better_ask_for_a_look():
    for names, asks in (("response_a response_b", True), ("good_answer bad_answer", False)):
        with pytest.raises(ValueError, match="Map the columns") as error:
            require(dataset(dict.fromkeys(names.split(), "text")), "preference")
        assert ("Make sure first that 'response_a' is the better answer" in str(error.value)) == asks


def test_rename_to_a_name_that_is_taken_is_refused_with_a_way_out():
    rows = dataset({"prompt": "x", "question": "y"})
    with pytest.raises(ValueError, match=r"already. Give that another name too, `old_prompt=prompt`, or remove it"):
        rename(rows, {"prompt": "question"})
    assert rename(rows, {"prompt": "question", "old_prompt": "prompt"})[0] == {"old_prompt": "x", "prompt": "y"}


def test_columns_are_parsed_from_a_command_line():
    parsed = parse_columns(["prompt=question", "chosen = the good one"])
    assert parsed == {"prompt": "question", "chosen": "the good one"}
    for pair in ("prompt", "=question", "prompt=", ""):
        with pytest.raises(ValueError, match="maps no column: write `--columns "):
            parse_columns([pair])
    with pytest.raises(ValueError, match=r"'prompt=b' maps 'prompt' a second time"):
        parse_columns(["prompt=a", "prompt=b"])
    with pytest.raises(ValueError, match=r"'chosen=a' maps 'a' a second time"):
        parse_columns(["prompt=a", "chosen=a"])


@pytest.mark.parametrize(
    "columns, task, expected",
    [
        ("question good bad", "preference", {"prompt": "question", "chosen": "good", "rejected": "bad"}),
        ("instruction chosen_response rejected_response", "preference",
         {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}),
        ("prompt response_chosen response_rejected", "preference",
         {"chosen": "response_chosen", "rejected": "response_rejected"}),
        ("chosen bad", "preference", {"rejected": "bad"}),
        ("Query Winner loser", "preference", {"prompt": "Query", "chosen": "Winner", "rejected": "loser"}),
        ("promt choosen rejectd", "preference", {"prompt": "promt", "chosen": "choosen", "rejected": "rejectd"}),
        ("question good_answer bad_answer", "preference",
         {"prompt": "question", "chosen": "good_answer", "rejected": "bad_answer"}),
        ("prompt response_a response_b", "preference", {"chosen": "response_a", "rejected": "response_b"}),
        ("question good", "preference", {}),
        ("alpha beta", "preference", {}),
        ("input instruction output", "prompts", {"prompt": "instruction"}),
        ("text", "prompts", {}),
    ],
)  # fmt: skip
def test_likeliest_columns_are_suggested(columns, task, expected):
    assert suggest_columns(dataset(dict.fromkeys(columns.split(), "some text")), task) == expected


def test_columns_that_hold_no_text_are_not_suggested():
    assert suggest_columns(dataset({"question": 3, "query": "what"}), "prompts") == {"prompt": "query"}


# --- the error


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_error_leads_to_a_dataset_that_can_be_used(make):
    """Its flag and its Python are followed to the letter."""
    rows = make(PAIRS)
    with pytest.raises(ValueError, match="`mine` has no columns 'chosen' and 'rejected'") as error:
        require(rows, "preference", "mine")
    text = str(error.value)
    assert "its columns are 'question' (text), 'good' (text), 'bad' (text). " in text
    flag = re.search(r"`--columns ([^`]+)`", text).group(1)
    require(rename(rows, parse_columns(flag.split())), "preference")
    names = eval(re.search(r"rename_columns\((\{.*?\})\)", text).group(1))
    require(rows.rename_columns(names), "preference")


@pytest.mark.parametrize(
    "row, task, message",
    [
        (
            {"prompt": "a", "completion": "b", "label": True},
            "preference",
            r"\(in TRL's terms unpaired preference\)\. Training on preferences needs .*to_preference\(dataset\)`",
        ),
        (
            {"prompt": "a", "completion": "b", "label": "good"},
            "preference",
            r"A `label` of true or false, or 1 or 0, .* with `dataset\.map`, then .*to_preference\(dataset\)`",
        ),
        ({"messages": USER + ANSWER}, "prompts", r"modeling, conversations\)\. PPO needs .*to_prompts\(dataset\)`"),
        ({"chosen": "ab", "rejected": "ac"}, "prompts", r"no column 'prompt'; .* implicit prompt\)\. .*to_prompts"),
        ({"text": "a"}, "prompts", r"as in `--columns prompt=question`.*docs/datasets.md has the formats"),
        (
            {"a": "x", "b": 3},
            "preference",
            r"'a' \(text\), 'b' \(number\)\. .* as in `--columns prompt=question chosen=good rejected=bad`",
        ),
    ],
)
def test_error_names_the_format_that_was_found_and_what_makes_of_it(row, task, message):
    with pytest.raises(ValueError, match=message):
        require(dataset(row), task)
