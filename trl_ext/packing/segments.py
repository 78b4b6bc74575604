"""
Rows [common | chosen | rejected]: what the two sequences of a pair have in common is computed once.

The common part is the longest common beginning: the prompt and, where the completions begin alike, their beginning
too. The tail of the rejected sequence takes the positions that follow the common part, and sees it and itself, not the
tail of the chosen one. So every log-probability is that of the sequence on its own. Pure: torch only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Token counts of a pair in its row: `common` + `chosen` in one causal piece, then the tail `rejected`."""

    common: int
    chosen: int
    rejected: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.common + self.chosen + self.rejected


@dataclass(frozen=True)
class SharedRows:
    """
    Pairs in R rows of T tokens, padded on the right.

    Args:
        input_ids (R, T).
        position_ids (R, T): the position of each token in its own sequence; 0 for padding.
        rows: for each row, the spans of its pairs, in order.
        packed_index (2B, L): where token t of sequence r stands in the flattened rows; 0 for padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: tuple[tuple[Span, ...], ...]
    packed_index: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(span.common + max(span.chosen, span.rejected) for row in self.rows for span in row)


def share_prefixes(input_ids: Tensor, attention_mask: Tensor, pairs_per_row: int | None = None) -> SharedRows:
    """
    Lays out TRL's batch of pairs in shared rows.

    Args:
        input_ids (2B, L): B chosen sequences, then the B rejected ones, padded on the right.
        attention_mask (2B, L): 1 for tokens.
        pairs_per_row: pairs side by side in a row; `None`: all of them, in one row without padding.
    """
    size, length = input_ids.size(0) // 2, input_ids.size(1)
    real = attention_mask.bool()
    same = (input_ids[:size] == input_ids[size:]) & real[:size] & real[size:]
    common = same.long().cumprod(1).sum(1).tolist()
    lengths = real.sum(1).tolist()
    spans = [
        Span(shared, chosen - shared, rejected - shared)
        for shared, chosen, rejected in zip(common, lengths[:size], lengths[size:], strict=True)
    ]
    per_row = pairs_per_row or size
    rows = tuple(tuple(spans[i : i + per_row]) for i in range(0, size, per_row))
    width = max(sum(span.size for span in row) for row in rows)

    # Where every token of a row comes from in the batch, and where every token of the batch went.
    source, target = [], []
    for pair, span in enumerate(spans):
        row, place = divmod(pair, per_row)
        start = row * width + sum(before.size for before in spans[pair - place : pair])
        chosen, rejected = pair * length, (size + pair) * length
        whole = span.common + span.chosen
        source += [(chosen, whole), (rejected + span.common, span.rejected)]
        target += [(start, whole), (start + whole, span.rejected)]
    source_index, target_index = _ranges(source), _ranges(target)
    device = input_ids.device
    source_index, target_index = source_index.to(device), target_index.to(device)
    packed_ids = input_ids.new_zeros(len(rows) * width)
    packed_ids[target_index] = input_ids.flatten()[source_index]
    position_ids = torch.zeros_like(packed_ids)
    position_ids[target_index] = source_index % length
    packed_index = torch.zeros_like(input_ids).flatten()
    packed_index[source_index] = target_index
    # The common part of the rejected sequence is that of the chosen one.
    packed_index = packed_index.view(2, size, length)
    packed_index[1] = torch.where(same.long().cumprod(1).bool(), packed_index[0], packed_index[1])
    shape = (len(rows), width)
    return SharedRows(packed_ids.view(shape), position_ids.view(shape), rows, packed_index.flatten(0, 1))


def membership(shared: SharedRows) -> tuple[Tensor, Tensor]:
    """
    For every token of the rows, (R, T) each: the number of its pair in the row, −1 for padding; and which sequence of
    the pair it belongs to, 0 for the chosen one, 1 for the rejected one, −1 for both.
    """
    pair, tail = torch.full((2, *shared.input_ids.shape), -1, dtype=torch.long)
    for r, row in enumerate(shared.rows):
        start = 0
        for k, span in enumerate(row):
            whole, end = start + span.common + span.chosen, start + span.size
            pair[r, start:end] = k
            tail[r, start + span.common : whole], tail[r, whole:end] = 0, 1
            start = end
    return pair.to(shared.input_ids.device), tail.to(shared.input_ids.device)


def attention_mask_of(shared: SharedRows, window: int | None = None) -> Tensor:
    """
    Who sees whom, as a mask (R, 1, T, T), True for yes: a token sees those before it in its own sequence, and itself,
    with a `window` the last so many of them; padding sees padding, since a softmax over nothing is NaN.
    """
    pair, tail = membership(shared)
    in_sequence = (tail[:, None, :] == -1) | (tail[:, :, None] == tail[:, None, :])
    sees = (pair[:, :, None] == pair[:, None, :]) & in_sequence
    if window is not None:  # in positions of the sequence, not in places of the row
        sees &= shared.position_ids[:, :, None] - shared.position_ids[:, None, :] < window
    return sees.tril().unsqueeze(1)


def _ranges(pieces: list[tuple[int, int]]) -> Tensor:
    """The concatenation of arange(start, start + count)."""
    return torch.cat([torch.arange(start, start + count) for start, count in pieces])
