"""Attention with a dense mask, the oracle of attention over packed rows."""

import torch


def tensors(rows, heads, key_value_heads, size=4):
    """Random queries, keys and values for packed rows."""
    generator = torch.Generator().manual_seed(0)
    count, width = rows.input_ids.shape
    return [
        torch.randn(count, each, width, size, generator=generator, dtype=torch.float64).requires_grad_()
        for each in (heads, key_value_heads, key_value_heads)
    ]


def dense(query, key, value, mask, scaling=None, softcap=None, sinks=None):
    """Scores between all tokens, softmax over those that are seen and a sink for each head, written out."""
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.size(-1) ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.exp() * mask
    sums = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return (weights / sums @ value).transpose(1, 2)


def output_and_gradients(function, leaves, real):
    """The output at real tokens, and the gradients of a weighted sum of it."""
    output = function(*leaves)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output[real], *torch.autograd.grad((output * weights)[real].sum(), leaves)]
