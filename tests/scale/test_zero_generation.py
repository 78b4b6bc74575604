"""Generation under ZeRO-3 and FSDP2 gathers the actor's weights once per rollout: counted in two processes."""

import pytest

import generation_worker
import tiny
import two_processes
import zero_runs


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]

ACTOR, CRITIC = (
    [parameter.numel() for parameter in model.parameters()] for model in (tiny.tiny_actor(), tiny.tiny_reward_model())
)
# What stays whole on every process from the first use on: tensors of at most ten times the hidden size ("auto").
SMALL = 10 * tiny.tiny_config().hidden_size


def share(sizes: list[int]) -> int:
    return sum((size + 1) // 2 for size in sizes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generation")
    zero_runs.save(folder)
    return two_processes.measured(generation_worker.measure, folder)


def elements(run):
    return [gathered for _, gathered, _, _ in run["rollouts"]]


@pytest.mark.parametrize("critic", ["model", "head"])
def test_rollout_gathers_every_weight_of_the_actor_once_and_none_of_the_critic(measured, critic):
    first, second = elements(measured[f"once, {critic}"])
    assert share([size for size in ACTOR if size > SMALL]) <= second <= first <= share(ACTOR)


def test_ranks_do_not_wait_for_each_other_at_every_token(measured):
    for run in ("once, model", "once, head"):
        assert [reductions for _, _, reductions, _ in measured[run]["rollouts"]] == [0, 0]


def test_control_trl_gathers_the_critic_too_and_waits_at_every_token(measured):
    first, second = elements(measured["as TRL"])
    whole = ACTOR + CRITIC
    assert share([size for size in whole if size > SMALL]) <= second <= first <= share(whole)
    for _, _, reductions, longest in measured["as TRL"]["rollouts"]:
        assert reductions >= longest


def test_weights_are_gathered_for_every_token_where_they_do_not_fit(measured):
    """Each token costs what a rollout does otherwise; but for the first, which finds what the pass before it left."""
    for _, gathered, _, longest in measured["per token"]["rollouts"]:
        assert gathered >= (longest - 1) * share([size for size in ACTOR if size > SMALL])


def test_processes_may_take_different_numbers_of_turns(measured):
    """As with tools. GRPO would gather in every turn, and wait for a process that has no turn left."""
    assert elements(measured["turns"]) == elements(measured["once, model"])


def test_what_is_gathered_changes_no_loss(measured):
    for run in ("as TRL", "per token"):
        assert measured[run]["loss"] == pytest.approx(measured["once, model"]["loss"], abs=1e-6)


@pytest.mark.parametrize("run", ["FSDP2, once", "FSDP2, turns"])
def test_fsdp_gathers_what_it_shards_once_and_waits_at_no_token(measured, run):
    """The embedding, each layer, norm and head together, and what of the critic is in no layer; not its layers."""
    units = 1 + tiny.tiny_config().num_hidden_layers + 1 + 1
    assert [rollout[:3] for rollout in measured[run]["rollouts"]] == [[units, 0, 0]] * 2


def test_control_trl_gathers_every_layer_for_every_token_of_fsdp(measured):
    for gathers, _, reductions, longest in measured["FSDP2, as TRL"]["rollouts"]:
        assert gathers >= tiny.tiny_config().num_hidden_layers * longest
        assert reductions >= longest
    assert measured["FSDP2, as TRL"]["loss"] == pytest.approx(measured["FSDP2, once"]["loss"], abs=1e-6)
