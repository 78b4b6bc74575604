"""Shared rows against the slow layout of the oracles: every token, position, index and mask, and who sees whom."""

import pytest
import torch

import oracles
from pair_rows import PAIRS, PER_ROW, batch
from trl_ext.packing.segments import Span, attention_mask_of, share_prefixes


PAIRS["all"] = [pair for pairs in PAIRS.values() for pair in pairs]


def slow_rows(pairs, per_row):
    per_row = per_row or len(pairs)
    return [oracles.shared_row(pairs[i : i + per_row]) for i in range(0, len(pairs), per_row)]


cases = pytest.mark.parametrize("case", PAIRS)
per_rows = pytest.mark.parametrize("per_row", PER_ROW)


@per_rows
@cases
def test_layout_holds_the_tokens_and_positions_of_the_oracle(case, per_row):
    shared = share_prefixes(*batch(PAIRS[case]), per_row)
    rows = slow_rows(PAIRS[case], per_row)
    width = max(map(len, rows))
    for got, index in ((shared.input_ids, 0), (shared.position_ids, 1)):
        assert got.tolist() == [[token[index] for token in row] + [0] * (width - len(row)) for row in rows]


@per_rows
@cases
def test_layout_finds_every_token_of_every_sequence(case, per_row):
    """`packed_index` leads to the token, at its position, in its own sequence; padding leads to 0."""
    pairs = PAIRS[case]
    ids, mask = batch(pairs, more=2)
    shared = share_prefixes(ids, mask, per_row)
    rows = slow_rows(pairs, per_row)
    width, per_row = max(map(len, rows)), per_row or len(pairs)
    expected = torch.zeros_like(ids)
    for r, row in enumerate(rows):
        for place, (_, position, sequences) in enumerate(row):
            for k, side in sequences:
                expected[side * len(pairs) + r * per_row + k, position] = r * width + place
    assert shared.packed_index.tolist() == expected.tolist()
    assert (shared.input_ids.flatten()[shared.packed_index][mask.bool()] == ids[mask.bool()]).all()


@per_rows
@cases
def test_layout_names_the_spans_and_the_longest_sequence(case, per_row):
    pairs = PAIRS[case]
    shared = share_prefixes(*batch(pairs), per_row)
    spans = []
    for chosen, rejected in pairs:
        common = oracles.common_beginning(chosen, rejected)
        spans.append(Span(common, len(chosen) - common, len(rejected) - common))
    assert [span for row in shared.rows for span in row] == spans
    assert [len(row) for row in shared.rows] == [
        len(pairs[i : i + n]) for n in [per_row or len(pairs)] for i in range(0, len(pairs), n)
    ]
    assert shared.longest == max(len(ids) for pair in pairs for ids in pair)


@per_rows
@cases
def test_mask_says_who_sees_whom(case, per_row):
    shared = share_prefixes(*batch(PAIRS[case]), per_row)
    mask = attention_mask_of(shared)
    rows = slow_rows(PAIRS[case], per_row)
    width = max(map(len, rows))
    assert mask.shape == (len(rows), 1, width, width)
    for r, row in enumerate(rows):
        size = len(row)
        assert mask[r, 0, :size, :size].tolist() == [[oracles.sees(one, other) for other in row] for one in row]
        # Nothing sees padding but padding, which sees itself: no softmax is over nothing.
        assert not mask[r, 0, :size, size:].any()
        assert not mask[r, 0, size:, :size].any()
        assert mask[r, 0].diagonal().all()


@cases
def test_mask_lets_a_token_see_its_own_sequence_and_no_other(case):
    """Read from the sequences: token t of a sequence sees exactly its tokens 0 to t."""
    pairs = PAIRS[case]
    ids, real = batch(pairs)
    shared = share_prefixes(ids, real)
    mask = attention_mask_of(shared)[0, 0]
    for index, length in zip(shared.packed_index.tolist(), real.sum(1).tolist(), strict=True):
        for t in range(length):
            assert set(mask[index[t]].nonzero().flatten().tolist()) == set(index[: t + 1])


@per_rows
@pytest.mark.parametrize("pad", [0, 7, 21])
def test_layout_does_not_depend_on_the_padding(pad, per_row):
    """Nor on a pad id that is also a token: padding is never part of a common beginning."""
    plain = share_prefixes(*batch(PAIRS["all"]), per_row)
    padded = share_prefixes(*batch(PAIRS["all"], pad=pad, more=5), per_row)
    assert (padded.input_ids == plain.input_ids).all()
    assert (padded.position_ids == plain.position_ids).all()
    assert padded.rows == plain.rows
    assert (padded.packed_index[:, :-5] == plain.packed_index).all()
    assert (padded.packed_index[:, -5:] == 0).all()


def test_one_row_has_no_padding_and_the_common_tokens_once():
    pairs = PAIRS["all"]
    shared = share_prefixes(*batch(pairs))
    tokens = sum(len(c) + len(r) - oracles.common_beginning(c, r) for c, r in pairs)
    assert shared.input_ids.shape == (1, tokens)
