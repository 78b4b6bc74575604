"""Pairs whose sequences have more or less in common, as rows."""

import torch


P = [11, 12, 13]

# (chosen, rejected) in token ids
PAIRS = {
    "plain": [([*P, 21, 22], [*P, 31])],
    "completions begin alike": [([*P, 40, 41, 21], [*P, 40, 41, 31, 32])],
    "rejected goes on": [([*P, 21], [*P, 21, 31])],
    "chosen goes on": [([*P, 21, 22], [*P, 21])],
    "nothing in common": [([21, 22, 23], [31, 32])],  # as `keep_end` truncation leaves it
    "equal": [([*P, 21], [*P, 21])],
    "prompt of one token": [([11, 21], [11, 31, 32])],
    "alike again later": [([*P, 21, 7, 7], [*P, 31, 7, 7])],
    "one token, another": [([21], [31])],
}

PER_ROW = [1, 2, None]


def batch(pairs, pad=0, more=0):
    """TRL's layout: the chosen sequences, then the rejected ones, padded on the right, by `more` than needed."""
    sequences = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
    length = max(map(len, sequences)) + more
    ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in sequences])
    return ids, mask
