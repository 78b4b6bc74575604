"""Sequences cut by tokens, against slow counts over random batches."""

from hypothesis import given
from hypothesis import strategies as st

from segment_trees import some_examples
from trl_ext.packing.budget import cut_by_tokens


@st.composite
def batches(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    groups = [[sum(sizes[:i]) + j for j in range(size)] for i, size in enumerate(sizes)]
    of_groups = [draw(st.integers(1, 9)) for _ in sizes]
    prompts = [of_groups[i] for i, size in enumerate(sizes) for _ in range(size)]
    answers = [draw(st.integers(1, 9)) for _ in prompts]
    return prompts, answers, draw(st.integers(2, 60)), groups


def size_of(part, prompts, answers, groups, packs):
    if not packs:
        return len(part) * (max(prompts[i] for i in part) + max(answers[i] for i in part))
    shared = [next(iter(part_of)) for group in groups if (part_of := set(group) & set(part))]
    return sum(prompts[i] for i in shared) + sum(answers[i] for i in part)


@some_examples
@given(batches(), st.booleans())
def test_parts_hold_every_sequence_once_and_keep_to_the_budget(batch, packs):
    prompts, answers, budget, groups = batch
    parts = cut_by_tokens(prompts, answers, budget, packs, groups)
    assert sorted(i for part in parts for i in part) == list(range(len(prompts)))
    sizes = [size_of(part, prompts, answers, groups, packs) for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        assert size <= budget or len(part) == 1
    for group in groups:
        if size_of(group, prompts, answers, groups, packs) <= budget:
            assert any(set(group) <= set(part) for part in parts)
    if packs:  # no two parts would fit into one
        assert all(one + other > budget for i, one in enumerate(sizes) for other in sizes[i + 1 :])


def test_longest_go_first_and_the_short_ones_fill_the_gaps():
    parts = cut_by_tokens([1] * 5, [8, 2, 5, 6, 1], 10, True, [[i] for i in range(5)])
    assert parts == [[0], [3, 1], [2, 4]]
