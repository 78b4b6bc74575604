"""Rows of segments against slow loops: positions, who sees whom, and where every token of a batch stands."""

import pytest
import torch
from hypothesis import given

import oracles
import segment_trees as trees
from trl_ext.packing import segments
from trl_ext.packing.segments import Piece, Segment, attention_mask_of, pack


def assert_positions_and_mask(rows, window=None):
    mask = attention_mask_of(rows, window)
    width = rows.input_ids.size(1)
    assert mask.shape == (len(rows.rows), 1, width, width)
    longest = 0
    for r, row in enumerate(rows.rows):
        tokens = oracles.segment_tokens(row)
        size = len(tokens)
        positions = [position for _, position, _ in tokens]
        longest = max([longest, *(position + 1 for position in positions)])
        assert rows.position_ids[r].tolist() == positions + [0] * (width - size)
        seen = [[oracles.sees(one, other, window) for other in tokens] for one in tokens]
        assert mask[r, 0, :size, :size].tolist() == seen
        # Nothing sees padding but padding, which sees itself: no softmax is over nothing.
        assert not mask[r, 0, :size, size:].any()
        assert not mask[r, 0, size:, :size].any()
        assert mask[r, 0].diagonal().all()
    assert rows.longest == longest


def assert_found_again(sequences, ids, mask, groups, row_size):
    rows = pack(ids, mask, groups, row_size)
    width = rows.input_ids.size(1)
    # Every token of every sequence, at its own position, and padding at 0
    sees = torch.block_diag(*attention_mask_of(rows)[:, 0])
    for sequence, places, real in zip(sequences, rows.packed_index, mask.bool(), strict=True):
        assert (places[~real] == 0).all()
        places = places[real]
        assert rows.input_ids.flatten()[places].tolist() == sequence
        assert rows.position_ids.flatten()[places].tolist() == list(range(len(sequence)))
        assert len({place // width for place in places.tolist()}) <= 1
        for t in range(len(sequence)):  # it sees exactly those of its own sequence up to itself
            assert set(sees[places[t]].nonzero().flatten().tolist()) == set(places[: t + 1].tolist())
    # The common tokens once, a group in the first row that has room for it
    taken = []
    for group in groups:
        members = [sequences[n] for n in group]
        size = sum(map(len, members)) - (len(members) - 1) * oracles.common_beginning(*members)
        room = [r for r, sum_of in enumerate(taken) if row_size is None or sum_of + size <= row_size]
        if room:
            taken[room[0]] += size
        else:
            taken.append(size)
    assert [sum(segment.size for segment in row) for row in rows.rows] == taken
    assert width == max(taken)


@trees.some_examples
@given(trees.trees(), trees.windows)
def test_positions_and_mask_of_any_trees_are_those_of_the_oracle(rows, window):
    assert_positions_and_mask(rows, window)


@trees.some_examples
@given(trees.batches())
def test_sequences_of_any_batch_are_found_again_in_their_rows(batch):
    assert_found_again(*batch)


def test_segments_of_a_group_are_its_beginning_and_what_each_sequence_has_of_its_own():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 0, 0], [3, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    three = (Segment(2), Segment(2, 0), Segment(1, 0))
    assert pack(ids[:3], mask[:3], [[0, 1, 2]]).rows == (three,)
    pairs = pack(ids, mask, [[0, 1], [3, 2]])
    alone = pack(ids, mask, [[0], [1], [2], [3]])
    assert alone.rows == ((Segment(4), Segment(3), Segment(2), Segment(1)),)
    assert pairs.rows == ((Segment(2), Segment(2, 0), Segment(1, 0), Segment(0), Segment(1, 3), Segment(2, 3)),)
    assert pairs.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 5, 6]]
    assert pairs.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 0, 1]]


def test_pieces_of_a_tree_are_its_lines():
    """A response to a prompt is one piece with it; a branch of it sees what stands before it of both."""
    row = [(3, None), (2, 0), (4, 1), (1, 1), (2, 0), (5, None)]
    (pieces,) = trees.packed(row).pieces
    assert pieces == (Piece(9, ()), Piece(1, ((0, 5),)), Piece(2, ((0, 3),)), Piece(5, ()))


def test_segments_out_of_order_are_refused():
    with pytest.raises(ValueError, match="Segment 2 goes on from segment 0, whose descendants have ended"):
        attention_mask_of(trees.packed([(1, None), (1, None), (1, 0)]))


# Mistakes that these tests notice

PAIRS = trees.packed(trees.side_by_side(trees.pair(3, 2, 2), trees.pair(2, 1, 2)), padding=1)
BATCH = ([[4, 4, 5], [4, 4, 6, 5]], torch.tensor([[4, 4, 5, 0], [4, 4, 6, 5]]), torch.tensor([[1, 1, 1, 0], [1] * 4]))


@pytest.mark.parametrize(
    "name, mistake",
    {
        "_path_ends": lambda row: [segment.size for segment in row],  # positions that start at 0
        "_subtree_ends": lambda row: [sum(segment.size for segment in row)] * len(row),  # siblings are seen
    }.items(),
)
def test_control_a_mistake_in_the_tree_is_noticed(name, mistake, monkeypatch):
    fresh = trees.packed(*PAIRS.rows, padding=1)
    monkeypatch.setattr(segments, name, mistake)
    with pytest.raises(AssertionError):
        assert_positions_and_mask(fresh)
    with pytest.raises(AssertionError):
        assert_found_again(*BATCH, [[0, 1]], None)


def test_control_a_token_counted_twice_is_noticed(monkeypatch):
    """The sequences of a group laid out apart."""
    together = segments.pack
    monkeypatch.setitem(globals(), "pack", lambda ids, mask, groups, size: together(ids, mask, [[0], [1]]))
    with pytest.raises(AssertionError):
        assert_found_again(*BATCH, [[0, 1]], None)
