"""
Rows of segments: many sequences in one row, and what some of them begin with only once.

A segment is a run of tokens that goes on from at most one other segment of its row, its parent. A token sees its own
segment up to itself, and all of its ancestors: the parent, the parent's parent and so on. Positions are counted along
that path. So every log-probability is that of the sequence on its own.

- A pair is what both sequences begin with, and two children: the rest of the chosen and of the rejected one.
- n responses to a prompt are the prompt with n children.
- Sequences that share nothing are segments without parents.

Pure: torch only.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Segment(NamedTuple):
    """`size` tokens, which go on from the segment number `parent` of their row, or from nothing."""

    size: int
    parent: int | None = None


class Piece(NamedTuple):
    """
    Segments in a line, each the parent of the next: `size` tokens that attend causally to each other.

    Args:
        before: what they see of earlier pieces, from the root on, as (number of the piece, how many of its tokens).
    """

    size: int
    before: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PackedRows:
    """
    R rows of T tokens, padded on the right.

    Args:
        input_ids (R, T).
        rows: the segments of each row, depth first: behind a segment come its descendants, then all others.
        packed_index (N, L): where token t of sequence n stands in the flattened rows; 0 for padding. So
            `x.flatten(0, 1)[packed_index]` takes any x (R, T, …) back to the layout of the sequences, (N, L, …).
    """

    input_ids: Tensor
    rows: tuple[tuple[Segment, ...], ...]
    packed_index: Tensor

    @property
    def longest(self) -> int:
        """Return how many tokens the longest sequence has."""
        return max((end for row in self.rows for end in _path_ends(row)), default=0)

    @cached_property
    def position_ids(self) -> Tensor:
        """Return the position of each token in its own sequence (R, T); 0 for padding."""
        positions = torch.zeros(self.input_ids.shape, dtype=torch.long)
        for row, segments in zip(positions, self.rows, strict=True):
            ends = _path_ends(segments)
            of_row = [torch.arange(end - segment.size, end) for segment, end in zip(segments, ends, strict=True)]
            row[: sum(map(len, of_row))] = torch.cat(of_row)
        return positions.to(self.input_ids.device)

    @cached_property
    def until(self) -> Tensor:
        """
        Return where in the row the descendants of each token's segment end (R, T): the tokens from its own place up
        to there see it, and no others. Padding sees padding, since a softmax over nothing is NaN.
        """
        until = torch.full(self.input_ids.shape, self.input_ids.size(1))
        for row, segments in zip(until, self.rows, strict=True):
            sizes = torch.tensor([segment.size for segment in segments])
            row[: int(sizes.sum())] = torch.tensor(_subtree_ends(segments)).repeat_interleave(sizes)
        return until.to(self.input_ids.device)

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """Return the pieces of each row in which attention is computed."""
        return tuple(map(_pieces, self.rows))


def pack(
    input_ids: Tensor, attention_mask: Tensor, groups: Sequence[Sequence[int]], row_size: int | None = None
) -> PackedRows:
    """
    Lay out sequences in rows. Those of a group stand in one row, with their longest common beginning once; a group
    stands in the first row that has room for it.

    Args:
        input_ids (N, L): padded on either side.
        attention_mask (N, L): 1 for tokens.
        groups: the sequences of each group; every sequence is in one of them.
        row_size: tokens of a row, at most; a group that has more has a row of its own. `None`: all in one row.
    """
    # 1. Tokens before padding; what the sequences of a group begin with
    order = attention_mask.argsort(dim=1, descending=True, stable=True)
    ids, real = input_ids.gather(1, order), attention_mask.gather(1, order).bool()
    lengths = real.sum(1).tolist()
    of_groups = ids[[member for group in groups for member in group]]
    alike = (of_groups[1:] == of_groups[:-1]).long().cumprod(1).sum(1).tolist()  # of neighbours
    # 2. Segments in rows, and for each sequence which tokens stand where: (sequence, first token, row, place, count)
    rows: list[list[Segment]] = []
    sizes: list[int] = []
    moves: list[tuple[int, int, int, int, int]] = []
    behind = 0
    for members in groups:
        shared = min([lengths[member] for member in members] + alike[behind : behind + len(members) - 1])
        behind += len(members)
        tails = [lengths[member] - shared for member in members]
        size = shared + sum(tails)
        fits = (r for r, taken in enumerate(sizes) if row_size is None or taken + size <= row_size)
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            sizes.append(0)
        parent, start = len(rows[row]), sizes[row]
        rows[row] += [Segment(shared), *(Segment(tail, parent) for tail in tails if tail)]
        sizes[row] += size
        place = start + shared
        for member, tail in zip(members, tails, strict=True):
            moves += [(member, 0, row, start, shared), (member, shared, row, place, tail)]
            place += tail
    # 3. The tokens in their rows, and the way back
    width, length = max(sizes), ids.size(1)
    source = _ranges((member * length + first, count) for member, first, _, _, count in moves).to(ids.device)
    target = _ranges((row * width + place, count) for _, _, row, place, count in moves).to(ids.device)
    packed_ids = ids.new_zeros(len(rows) * width)
    packed_ids[target] = ids.flatten()[source]
    index = torch.zeros_like(order).flatten()
    index[source] = target
    packed_index = torch.zeros_like(order).scatter(1, order, index.view_as(order))
    return PackedRows(packed_ids.view(len(rows), width), tuple(map(tuple, rows)), packed_index)


def pairs_of(sequences: int) -> list[tuple[int, int]]:
    """Return the groups of TRL's layout of pairs: the chosen sequences, then the rejected ones in the same order."""
    return list(zip(range(sequences // 2), range(sequences // 2, sequences), strict=True))


def attention_mask_of(rows: PackedRows, window: int | None = None) -> Tensor:
    """
    Return who sees whom as a mask (R, 1, T, T), True for yes; with a `window`, a token sees the last so many tokens of
    its own sequence, itself among them.
    """
    place = torch.arange(rows.input_ids.size(1), device=rows.input_ids.device)
    sees = (place[:, None] >= place) & (place[:, None] < rows.until[:, None, :])
    if window is not None:  # in positions of the sequence, not in places of the row
        sees &= rows.position_ids[:, :, None] - rows.position_ids[:, None, :] < window
    return sees.unsqueeze(1)


def _path_ends(segments: tuple[Segment, ...]) -> list[int]:
    """Return how many tokens there are from the root up to the end of each segment."""
    ends: list[int] = []
    for segment in segments:
        ends.append(segment.size + (0 if segment.parent is None else ends[segment.parent]))
    return ends


def _subtree_ends(segments: tuple[Segment, ...]) -> list[int]:
    """
    Return the place in the row where the last descendant of each segment ends.

    Raises:
        ValueError: for segments that are not in depth-first order.
    """
    ends = [0] * len(segments)
    path: list[int] = []  # the segments that the next one can go on from
    place = 0
    for i, segment in enumerate(segments):
        while path and path[-1] != segment.parent:
            ends[path.pop()] = place
        if segment.parent is not None and not path:
            raise ValueError(
                f"Segment {i} goes on from segment {segment.parent}, whose descendants have ended before it. Put the "
                "descendants of a segment directly behind it."
            )
        path.append(i)
        place += segment.size
    for i in path:
        ends[i] = place
    return ends


def _pieces(segments: tuple[Segment, ...]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    ends: list[tuple[int, int]] = []  # of each segment: its piece, and after how many of the piece's tokens it ends
    for i, (size, parent) in enumerate(segments):
        if i > 0 and parent == i - 1:
            pieces[-1] = Piece(pieces[-1].size + size, pieces[-1].before)
        elif parent is None:
            pieces.append(Piece(size, ()))
        else:
            of_parent = ends[parent]
            pieces.append(Piece(size, (*pieces[of_parent[0]].before, of_parent)))
        ends.append((len(pieces) - 1, pieces[-1].size))
    return tuple(pieces)


def _ranges(pieces: Iterable[tuple[int, int]]) -> Tensor:
    """Return the concatenation of arange(start, start + count)."""
    return torch.cat([torch.arange(start, start + count) for start, count in pieces])
