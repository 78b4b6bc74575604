"""turn_rewards.py: what an environment pays for turns stands at the last token of each."""

import itertools
import random

import pytest

from trl_ext.ppo.roles.turn_rewards import turn_sources


class Paying:
    """Pays what it was made with."""

    def __init__(self, turns):
        self.turns = turns

    def get_turn_rewards(self):
        return self.turns


def paid_by_hand(mask, draw):
    """A reward for each run of ones, and the same at its last token."""
    turns, paid = [], []
    for counts, run in itertools.groupby(mask):
        paid += [0.0 for _ in run]
        if counts:
            turns.append(draw.uniform(-1, 1))
            paid[-1] = turns[-1]
    return turns, paid


@pytest.mark.parametrize("tools_wrote", [True, False])
def test_turns_are_paid_at_their_last_tokens(tools_wrote):
    """Responses of up to 30 tokens with turns at random; where no tool wrote any, each is one turn."""
    draw = random.Random(0)
    masks = [[int(not tools_wrote or draw.random() < 0.6) for _ in range(length)] for length in range(1, 31)]
    turns, expected = zip(*(paid_by_hand(mask, draw) for mask in masks), strict=True)
    _, (source,) = turn_sources(Paying, lambda: masks if tools_wrote else None)
    paid = source(environments=[Paying(each) for each in turns], completions=masks, completion_ids=masks)
    assert paid == list(expected)
    assert tools_wrote == any(len(each) > 3 for each in turns)
