"""What a run says of its model: the actor alone, whatever hangs on it."""

import pytest

import tiny
from trl_ext.ppo.roles.adapters import CRITIC, REWARD
from trl_ext.runs.facts import ATTACHED, model_facts


@pytest.mark.parametrize("role", [CRITIC, REWARD])
def test_parameters_are_the_actors(role):
    actor = tiny.tiny_actor()
    alone = model_facts(actor)
    setattr(actor, role, tiny.tiny_reward_model())
    assert model_facts(actor) == alone
    assert role in ATTACHED
