"""Attention with a dense mask, the oracle of attention over shared rows."""

import torch


def tensors(shared, heads, key_value_heads, size=4):
    generator = torch.Generator().manual_seed(0)
    rows, width = shared.input_ids.shape
    return [
        torch.randn(rows, count, width, size, generator=generator, dtype=torch.float64).requires_grad_()
        for count in (heads, key_value_heads, key_value_heads)
    ]


def real_tokens(shared):
    """(R, T): True where a row has a token."""
    sizes = torch.tensor([sum(span.size for span in row) for row in shared.rows])
    return torch.arange(shared.input_ids.size(1)) < sizes[:, None]


def dense(query, key, value, mask, scaling=None):
    """Scores between all tokens, softmax over those that are seen, written out."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)
