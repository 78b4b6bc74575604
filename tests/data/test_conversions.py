"""Datasets converted: against TRL's own conversions, in the other direction or by hand."""

import copy
import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from trl import extract_prompt, maybe_convert_to_chatml, maybe_extract_prompt, unpair_preference_dataset

from dataset_rows import ANSWER, OTHER, SHAREGPT, USER, dataset, stream
from trl_ext.data.conversions import to_conversations, to_preference, to_prompts


MORE = [{"role": "user", "content": "why"}]
ROWS = [
    {"prompt": "one", "chosen": "good", "rejected": "bad", "source": "a"},
    {"prompt": "two", "chosen": "great", "rejected": "awful", "source": "b"},
]


def rows_of(data):
    return [dict(row) for row in data]


# --- pairs


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize("columns", [{}, {"prompt": "q", "chosen": "w", "rejected": "l"}])
def test_pairs_stay_as_they_are_under_their_new_names(make, columns):
    given = [{columns.get(name, name): value for name, value in row.items()} for row in ROWS]
    assert rows_of(to_preference(make(*given), columns)) == ROWS


def test_pairs_that_trl_has_taken_apart_are_put_together():
    apart = unpair_preference_dataset(dataset(*ROWS)).shuffle(seed=1)
    together = sorted(rows_of(to_preference(apart)), key=lambda row: row["prompt"])
    assert together == ROWS
    conversations = dataset({"prompt": USER, "chosen": ANSWER, "rejected": OTHER})
    assert rows_of(to_preference(unpair_preference_dataset(conversations))) == rows_of(conversations)


def test_every_unpaired_completion_is_in_a_pair(caplog):
    good, bad = ["g1", "g2", "g3"], ["b1", "b2"]
    rows = [{"prompt": "p", "completion": text, "label": int(text in good), "id": text} for text in [*bad, *good]]
    rows.append({"prompt": "alone", "completion": "x", "label": 1, "id": "x"})
    assert rows_of(to_preference(dataset(*rows))) == [
        {"prompt": "p", "id": "g1", "chosen": "g1", "rejected": "b1"},
        {"prompt": "p", "id": "g2", "chosen": "g2", "rejected": "b2"},
        {"prompt": "p", "id": "g3", "chosen": "g3", "rejected": "b1"},
    ]
    assert "Left out 1 of 2 prompts" in caplog.text


def test_unpaired_preferences_that_cannot_be_paired_say_why():
    row = {"prompt": "p", "completion": "c", "label": True}
    with pytest.raises(ValueError, match="All completions of each prompt have the same label \\(1 prompts\\)"):
        to_preference(dataset(row))
    with pytest.raises(ValueError, match=r"Row 1 has the label 3; .* true or false, or 1 or 0"):
        to_preference(dataset(row | {"label": 1}, row | {"label": 3}))
    with pytest.raises(ValueError, match=r"a stream shows one row after the other. Load the rows"):
        to_preference(stream(row))


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_sharegpt_pairs_get_roles_that_templates_know(make):
    row = {"prompt": SHAREGPT[:1], "chosen": SHAREGPT[1:], "rejected": [{"from": "gpt", "value": "bad"}], "id": 7}
    (converted,) = to_preference(make(row))
    assert converted == {"prompt": USER, "chosen": ANSWER, "rejected": OTHER, "id": 7}
    (by_trl,) = make(copy.deepcopy(row)).map(maybe_convert_to_chatml)  # the control: TRL changes keys, not names
    assert [message["role"] for message in by_trl["prompt"]] == ["human"]


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_text_prompt_beside_conversations_is_what_trl_extracts(make):
    row = {"prompt": "what", "chosen": USER + ANSWER, "rejected": USER + OTHER, "score": 1}
    (converted,) = to_preference(make(row))
    assert converted == maybe_extract_prompt(row) | {"score": 1}
    assert converted["prompt"] == USER


def test_text_prompt_beside_answers_becomes_a_turn():
    (converted,) = to_preference(dataset({"prompt": "what", "chosen": ANSWER, "rejected": OTHER}))
    assert converted == {"prompt": USER, "chosen": ANSWER, "rejected": OTHER}


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
def test_text_becomes_turns_and_conversations_stay(make):
    chat = {"prompt": USER, "chosen": ANSWER, "rejected": OTHER, "source": "a"}
    text = {name: value if name == "source" else value[0]["content"] for name, value in chat.items()}
    ids = {"input_ids": [1, 2]}
    for row, wanted in ((text, chat), (chat, chat), (ids, ids), ({"prompt": text["prompt"]}, {"prompt": USER})):
        assert rows_of(to_conversations(make(row))) == [wanted]
    assert to_conversations({"train": make(text)}).keys() == {"train"}
    with pytest.raises(ValueError, match=r"Pairs of text without `prompt` .*`--columns prompt=NAME`"):
        to_conversations(make({"chosen": "a b", "rejected": "a c"}))


@pytest.mark.parametrize("row", [{"prompt": "p", "completion": "c"}, {"text": "t"}, {"messages": USER + ANSWER}])
def test_what_has_no_pairs_is_refused(row):
    with pytest.raises(ValueError, match="`dataset` has no columns 'chosen' and 'rejected'"):
        to_preference(dataset(row))


# --- prompts

HH = "\n\nHuman: what\n\nAssistant: good\n\nHuman: why\n\nAssistant:"


@pytest.mark.parametrize("make", [dataset, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": "p"}, "p"),
        ({"prompt": USER}, USER),
        ({"prompt": "p", "completion": "c"}, "p"),
        ({"prompt": USER, "completion": ANSWER}, USER),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
        ({"prompt": USER, "chosen": ANSWER, "rejected": OTHER}, USER),
        ({"prompt": "what", "chosen": USER + ANSWER, "rejected": USER + OTHER}, USER),
        ({"prompt": "what", "chosen": ANSWER, "rejected": OTHER}, USER),
        ({"prompt": "p", "completion": "c", "label": True}, "p"),
        ({"prompt": "p", "completions": ["c"], "labels": [True]}, "p"),
        ({"chosen": USER + ANSWER, "rejected": USER + OTHER}, USER),
        ({"chosen": HH + " Sure, yes.", "rejected": HH + " Sure, no."}, HH),
        ({"messages": USER + ANSWER}, USER),
        ({"messages": USER + ANSWER + MORE}, USER + ANSWER + MORE),
        ({"conversations": SHAREGPT}, USER),
        ({"conversations": USER + ANSWER}, USER),
        ({"prompt": SHAREGPT[:1]}, USER),
    ],
)
def test_prompts_are_found_in_every_format_and_other_columns_kept(make, row, prompt):
    (found,) = to_prompts(make(row | {"solution": "42"}))
    assert found == {"prompt": prompt, "solution": "42"}


def test_common_beginning_of_two_texts_is_what_trl_extracts():
    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    (found,) = to_prompts(dataset(row))
    assert found == {"prompt": extract_prompt(row)["prompt"]}
    (control,) = to_prompts(dataset({"chosen": HH + " Sure, yes.", "rejected": HH + " Sure, no."}))
    assert not control["prompt"].endswith("Sure,")  # which TRL's common beginning does


def test_token_ids_stay_and_columns_are_mapped():
    for row in ({"input_ids": [1, 2], "label": "y"}, {"prompt": "p", "label": "y"}):  # read by a reward function
        assert rows_of(to_prompts(dataset(row))) == [row]
    assert to_prompts(dataset({"q": "p", "answer": "a"}), {"prompt": "q"})[0] == {"prompt": "p", "answer": "a"}


def test_splits_are_converted_each():
    splits = to_prompts(DatasetDict(train=dataset(ROWS[0]), test=dataset(ROWS[1])))
    assert isinstance(splits, DatasetDict)
    assert {name: rows["prompt"][:] for name, rows in splits.items()} == {"train": ["one"], "test": ["two"]}
    with pytest.raises(ValueError, match=r"In the split 'test': `dataset` has no column 'prompt'"):
        to_prompts({"train": dataset(ROWS[0]), "test": dataset({"text": "t"})})


def test_rows_of_the_original_are_left_alone():
    rows = dataset({"conversations": SHAREGPT})
    before = json.dumps(rows_of(rows))
    to_prompts(rows)
    assert json.dumps(rows_of(rows)) == before
    assert isinstance(to_preference(dataset(*ROWS)), Dataset)
    assert isinstance(to_preference(stream(*ROWS)), IterableDataset)
