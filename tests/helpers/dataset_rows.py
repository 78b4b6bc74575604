"""Rows in every format that TRL knows."""

from datasets import Dataset, IterableDataset


USER = [{"role": "user", "content": "what"}]

ANSWER = [{"role": "assistant", "content": "good"}]

OTHER = [{"role": "assistant", "content": "bad"}]

SHAREGPT = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "good"}]

PAIRS = {"question": "what", "good": "yes", "bad": "no"}

# TRL's formats as its documentation writes them, standard and conversational.
EXAMPLES = [
    ("language modeling", {"text": "The sky is blue."}),
    ("language modeling, conversations", {"messages": USER + ANSWER}),
    ("language modeling, ShareGPT", {"conversations": SHAREGPT}),
    ("prompt-only", {"prompt": "The sky is"}),
    ("prompt-only", {"prompt": USER}),
    ("prompt-completion", {"prompt": "The sky is", "completion": " blue."}),
    ("prompt-completion", {"prompt": USER, "completion": ANSWER}),
    ("preference", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
    ("preference", {"prompt": USER, "chosen": ANSWER, "rejected": OTHER, "tools": "[]"}),
    ("preference with an implicit prompt", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ("preference with an implicit prompt", {"chosen": USER + ANSWER, "rejected": USER + OTHER}),
    ("unpaired preference", {"prompt": "The sky is", "completion": " blue.", "label": True}),
    ("unpaired preference", {"prompt": USER, "completion": ANSWER, "label": 1}),
    ("stepwise supervision", {"prompt": "2 + 2 is", "completions": ["2", "4"], "labels": [False, True]}),
    ("tokenised prompts", {"input_ids": [1, 2, 3]}),
    (None, {"question": "what", "answer": "yes"}),
    (None, {"prompt": 3}),
    (None, {"chosen": "yes", "rejected": ["no"]}),
]


def dataset(*rows):
    return Dataset.from_list(list(rows))


def stream(*rows):
    """A stream that does not know its columns before its first row."""
    return IterableDataset.from_generator(lambda: iter(rows))
