"""advantages.py against written-out sums over the counted tokens, and the identities between the estimators."""

import functools

import pytest
import torch

import oracles
from trl_ext.ppo import advantages


GAMMA, LAM = 0.9, 0.7


def expected(oracle, b, *tensors, **settings):
    return oracles.per_sequence(functools.partial(oracle, **settings), b.mask, *tensors)


@pytest.mark.parametrize("gamma", [1.0, GAMMA, 0.0])
def test_rewards_to_go_equal_the_sum(gamma):
    b = oracles.batch()
    result = advantages.rewards_to_go(b.rewards, b.mask, gamma)
    torch.testing.assert_close(result, expected(oracles.rewards_to_go, b, b.rewards, gamma=gamma), **oracles.FLOAT64)


def test_td_error_equals_its_definition():
    b = oracles.batch()
    result = advantages.td_error(b.rewards, b.values, b.mask, GAMMA)
    torch.testing.assert_close(
        result, expected(oracles.td_error, b, b.rewards, b.values, gamma=GAMMA), **oracles.FLOAT64
    )


@pytest.mark.parametrize("lam", [0.0, LAM, 1.0])
@pytest.mark.parametrize("gamma", [1.0, GAMMA])
def test_gae_equals_the_mean_of_all_n_step_advantages(gamma, lam):
    b = oracles.batch()
    result = advantages.gae(b.rewards, b.values, b.mask, gamma, lam)
    torch.testing.assert_close(
        result, expected(oracles.gae, b, b.rewards, b.values, gamma=gamma, lam=lam), **oracles.FLOAT64
    )


def test_gae_takes_a_lam_for_each_sequence():
    b = oracles.batch()
    lams = torch.linspace(0, 1, len(b.mask), dtype=torch.float64)
    result = advantages.gae(b.rewards, b.values, b.mask, GAMMA, lams)
    for row, lam in enumerate(lams.tolist()):
        rewards, values = (tensor[row][b.mask[row]].tolist() for tensor in (b.rewards, b.values))
        assert result[row][b.mask[row]].tolist() == pytest.approx(oracles.gae(rewards, values, GAMMA, lam))


def test_length_adaptive_lam_follows_the_tokens_that_count():
    """λ = 1 − 1/(α · l): α · l = 2 gives ½, 1 or less 0, and a long response 1."""
    mask = torch.zeros(5, 40, dtype=torch.bool)
    for row, length in enumerate([0, 1, 10, 20, 40]):
        mask[row, 1 : 2 * length : 2] = True  # with holes
    mask[4] = True
    assert advantages.length_adaptive_lam(mask, 0.1).tolist() == pytest.approx([0, 0, 0, 0.5, 0.75])
    assert advantages.length_adaptive_lam(mask, 1e9)[1:].tolist() == pytest.approx([1, 1, 1, 1])


@pytest.mark.parametrize("critic_lam", [0.0, 0.4, 1.0])
def test_returns_may_have_a_lam_of_their_own(critic_lam):
    """Decoupled GAE: advantages keep `lam`; with both equal it is GAE."""
    b = oracles.batch()
    args = ("gae", b.rewards, b.values, b.mask, GAMMA)
    plain, returns = advantages.estimate_advantages(*args, LAM, critic_lam)
    targets = expected(oracles.gae, b, b.rewards, b.values, gamma=GAMMA, lam=critic_lam)
    torch.testing.assert_close(returns, targets + b.values.masked_fill(~b.mask, 0), **oracles.FLOAT64)
    assert torch.equal(plain, advantages.estimate_advantages(*args, LAM)[0])
    both, one = (advantages.estimate_advantages(*args, critic_lam, each) for each in (critic_lam, None))
    assert torch.equal(both[1], one[1])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_n_step_equals_n_rewards_and_a_value(n):
    b = oracles.batch()
    result = advantages.n_step_advantages(b.rewards, b.values, b.mask, GAMMA, n)
    torch.testing.assert_close(
        result, expected(oracles.n_step, b, b.rewards, b.values, gamma=GAMMA, n=n), **oracles.FLOAT64
    )


def test_gae_by_hand():
    """Tokens 1, 2 around a hole: δ_2 = 1 − ¼ = 0.75, δ_1 = 0 + ½·¼ − ½ = −0.375, Â_1 = δ_1 + ½·½·δ_2 = −0.1875."""
    mask = torch.tensor([[True, False, True, False]])
    rewards, values = torch.tensor([[0.0, 9.0, 1.0, 9.0]]), torch.tensor([[0.5, 9.0, 0.25, 9.0]])
    assert advantages.gae(rewards, values, mask, 0.5, 0.5).tolist() == [[-0.1875, 0.0, 0.75, 0.0]]


def test_gae_with_lam_0_is_the_td_error():
    b = oracles.batch()
    td_error = advantages.td_error(b.rewards, b.values, b.mask, GAMMA)
    torch.testing.assert_close(advantages.gae(b.rewards, b.values, b.mask, GAMMA, 0.0), td_error, **oracles.FLOAT64)


def test_gae_with_lam_1_is_return_minus_value():
    b = oracles.batch()
    difference = (advantages.rewards_to_go(b.rewards, b.mask, GAMMA) - b.values).masked_fill(~b.mask, 0)
    torch.testing.assert_close(advantages.gae(b.rewards, b.values, b.mask, GAMMA, 1.0), difference, **oracles.FLOAT64)


def test_gae_telescopes_only_for_lam_1():
    """Σ (gamma lam)^l r − V is GAE for lam = 1 only (docs/theory.md §4); this is the difference for others."""
    b = oracles.batch()
    claimed = (advantages.rewards_to_go(b.rewards, b.mask, GAMMA * LAM) - b.values).masked_fill(~b.mask, 0)
    assert (advantages.gae(b.rewards, b.values, b.mask, GAMMA, LAM) - claimed).abs().max() > 0.1


def test_n_step_with_n_1_is_the_td_error():
    b = oracles.batch()
    td_error = advantages.td_error(b.rewards, b.values, b.mask, GAMMA)
    torch.testing.assert_close(
        advantages.n_step_advantages(b.rewards, b.values, b.mask, GAMMA, 1), td_error, **oracles.FLOAT64
    )


def test_n_step_with_the_whole_episode_is_return_minus_value():
    b = oracles.batch()
    monte_carlo = advantages.gae(b.rewards, b.values, b.mask, GAMMA, 1.0)
    torch.testing.assert_close(
        advantages.n_step_advantages(b.rewards, b.values, b.mask, GAMMA, b.mask.shape[1]),
        monte_carlo,
        **oracles.FLOAT64,
    )


def test_value_targets_add_the_old_values():
    b = oracles.batch()
    result = advantages.value_targets(b.advantages, b.old_values)[b.mask].tolist()
    pairs = zip(oracles.counted(b.advantages, b.mask), oracles.counted(b.old_values, b.mask), strict=True)
    assert result == [advantage + value for advantage, value in pairs]


@pytest.mark.parametrize(
    ("estimator", "oracle"),
    [
        ("gae", functools.partial(oracles.gae, gamma=GAMMA, lam=LAM)),
        ("1_step", functools.partial(oracles.td_error, gamma=GAMMA)),
        ("3_step", functools.partial(oracles.n_step, gamma=GAMMA, n=3)),
        ("12_step", functools.partial(oracles.n_step, gamma=GAMMA, n=12)),
        ("reinforce", lambda rewards, values: oracles.rewards_to_go(rewards, GAMMA)),
        ("reinforce_baseline", functools.partial(oracles.gae, gamma=GAMMA, lam=1.0)),
    ],
)
def test_estimate_advantages_names_the_estimators(estimator, oracle):
    b = oracles.batch()
    result, returns = advantages.estimate_advantages(estimator, b.rewards, b.values, b.mask, GAMMA, LAM)
    advantage = oracles.per_sequence(oracle, b.mask, b.rewards, b.values)
    baseline = 0 if estimator == "reinforce" else b.values.masked_fill(~b.mask, 0)
    torch.testing.assert_close(result, advantage, **oracles.FLOAT64)
    torch.testing.assert_close(returns, advantage + baseline, **oracles.FLOAT64)


@pytest.mark.parametrize("estimator", ["reinforce", "reinforce_baseline"])
def test_returns_of_both_reinforce_forms_are_rewards_to_go(estimator):
    b = oracles.batch()
    _, returns = advantages.estimate_advantages(estimator, b.rewards, b.values, b.mask, GAMMA, LAM)
    torch.testing.assert_close(returns, advantages.rewards_to_go(b.rewards, b.mask, GAMMA), **oracles.FLOAT64)


@pytest.mark.parametrize("garbage", oracles.GARBAGE)
@pytest.mark.parametrize("estimator", ["gae", "2_step", "reinforce", "reinforce_baseline"])
def test_padding_changes_nothing(estimator, garbage):
    b = oracles.batch()
    rewards, values = (tensor.masked_fill(~b.mask, garbage) for tensor in (b.rewards, b.values))
    clean = advantages.estimate_advantages(estimator, b.rewards, b.values, b.mask, GAMMA, LAM)
    dirty = advantages.estimate_advantages(estimator, rewards, values, b.mask, GAMMA, LAM)
    assert all(torch.equal(x, y) for x, y in zip(clean, dirty, strict=True))
    assert not any(result[~b.mask].any() for result in dirty)


def test_holes_are_stepped_over():
    """The counted tokens alone, packed side by side, give the same numbers."""
    b = oracles.batch()
    row = b.mask[2]
    packed = advantages.gae(b.rewards[2:3, row], b.values[2:3, row], torch.ones(1, 4).bool(), GAMMA, LAM)
    assert torch.equal(advantages.gae(b.rewards, b.values, b.mask, GAMMA, LAM)[2, row], packed[0])


@pytest.mark.parametrize("estimator", ["GAE", "step", "0_step", "<n>_step", "-1_step", "vtrace", ""])
def test_an_unknown_estimator_is_refused_with_the_known_ones(estimator):
    with pytest.raises(ValueError, match=r"choose one of gae, reinforce, reinforce_baseline or <n>_step"):
        advantages.find_estimator(estimator)


def test_n_below_1_is_refused():
    b = oracles.batch()
    with pytest.raises(ValueError, match=r"n is 0.*choose n >= 1"):
        advantages.n_step_advantages(b.rewards, b.values, b.mask, GAMMA, 0)


def test_a_shape_that_would_broadcast_is_refused():
    b = oracles.batch()
    with pytest.raises(ValueError, match=r"values has shape \(6, 1\)"):
        advantages.gae(b.rewards, b.values[:, :1], b.mask, GAMMA, LAM)
