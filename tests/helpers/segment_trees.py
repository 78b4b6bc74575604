"""Random rows of segments, and random batches of sequences that begin alike, for hypothesis."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from torch import Tensor

from trl_ext.packing.segments import PackedRows, Segment


# The same examples every time; their number, not their time, is what is set.
some_examples = settings(max_examples=40, deadline=None, derandomize=True, database=None)
few_examples = settings(some_examples, max_examples=8)
windows = st.sampled_from([None, 1, 2, 4])


def packed(*rows: Sequence[tuple], padding: int = 0, device: str = "cpu") -> PackedRows:
    """Rows of segments (size, parent), the longest of which has `padding` behind it."""
    width = max(sum(size for size, _ in row) for row in rows) + padding
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    return PackedRows(ids, tuple(tuple(Segment(*segment) for segment in row) for row in rows), ids[:0])


def pair(common: int, chosen: int, rejected: int) -> list[tuple]:
    return [(common, None), (chosen, 0), (rejected, 0)]


def side_by_side(*trees: Sequence[tuple]) -> list[tuple]:
    """One row of several trees."""
    row: list[tuple] = []
    for tree in trees:
        row += [(size, None if parent is None else parent + len(row)) for size, parent in tree]
    return row


def real_tokens(rows: PackedRows) -> Tensor:
    """(R, T): True where a row has a token."""
    sizes = torch.tensor([sum(segment.size for segment in row) for row in rows.rows])
    return torch.arange(rows.input_ids.size(1)) < sizes[:, None]


@st.composite
def trees(draw: Any, largest: int = 4) -> PackedRows:
    """Rows of segments of 0 to `largest` tokens: any tree beside any other, depth first."""
    rows = []
    for _ in range(draw(st.integers(1, 2))):
        row: list[tuple] = []
        path: list[int] = []  # what the next segment can go on from
        for i in range(draw(st.integers(1, 7))):
            path = path[: draw(st.integers(0, len(path)))]
            row.append((draw(st.integers(0, largest)), path[-1] if path else None))
            path.append(i)
        rows.append(row)
    assume(any(size for row in rows for size, _ in row))
    return packed(*rows, padding=draw(st.integers(1, 3)))


@st.composite
def batches(draw: Any) -> tuple[list[list[int]], Tensor, Tensor, list[list[int]], int | None]:
    """Sequences, their ids and mask, padded on either side, their groups, and the size of a row."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    # Of two tokens, one of them the padding: sequences begin alike, and are alike again later.
    sequences = [draw(st.lists(st.integers(0, 1), max_size=5)) for _ in range(sum(sizes))]
    length = max(map(len, sequences)) + draw(st.integers(1, 2))
    ids, mask = torch.zeros(2, len(sequences), length, dtype=torch.long)
    for n, sequence in enumerate(sequences):
        first = draw(st.sampled_from([0, length - len(sequence)]))
        ids[n, first : first + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[n, first : first + len(sequence)] = 1
    order = draw(st.permutations(range(len(sequences))))
    members = iter(order)
    groups = [list(islice(members, size)) for size in sizes]
    return sequences, ids, mask, groups, draw(st.sampled_from([None, 0, 6, 12]))
