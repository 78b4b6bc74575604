"""What docs/theory.md says of gradients and optima, by enumeration: every expectation is a sum over all episodes."""

import torch

import oracles
from trl_ext.dpo.losses import implicit_reward
from trl_ext.ppo.advantages import gae, rewards_to_go
from trl_ext.ppo.kl import k2
from trl_ext.ppo.losses import clip_objective, policy_ratio


TOKENS = 3
EPISODES = torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOKENS))  # (9, 2)
STATES = torch.stack([torch.zeros(len(EPISODES), dtype=torch.long), 1 + EPISODES[:, 0]], dim=1)  # (9, 2), of 4 states
MASK = torch.ones(len(EPISODES), 2, dtype=torch.bool)


def close(actual, expected):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), **oracles.FLOAT64)


def problem():
    """Logits (4, 3) of the policy, a leaf, and rewards (9, 2): a first one for each token, a second for each pair."""
    theta = torch.randn(1 + TOKENS, TOKENS, dtype=torch.float64, requires_grad=True)
    first, second = torch.randn(TOKENS).double() + 2, torch.randn(len(EPISODES)).double() + 2
    return theta, torch.stack([first[EPISODES[:, 0]], second], dim=1)


def token_logps(theta):
    return theta.log_softmax(-1)[STATES, EPISODES]


def gradient_of_the_return(theta, rewards):
    """∇J, J = Σ P(τ) R(τ) over all episodes."""
    expected_return = (token_logps(theta).sum(1).exp() * rewards.sum(1)).sum()
    return torch.autograd.grad(expected_return, theta)[0]


def episode_gradients(theta, weights):
    """Σ_t ∇log π(a_t|s_t) · weight_t of every episode, (9, 12)."""
    logps = token_logps(theta)
    objective = clip_objective(policy_ratio(logps, logps.detach()), weights, cliprange=0.2).sum(1)
    return torch.stack([torch.autograd.grad(one, theta, retain_graph=True)[0].flatten() for one in objective])


def moments(theta, weights):
    """Mean (4, 3) and total variance of the episodes' gradients, over the policy's own episodes."""
    probabilities = token_logps(theta).sum(1).exp().detach()
    gradients = episode_gradients(theta, weights)
    mean = probabilities @ gradients
    return mean.view_as(theta), probabilities @ (gradients - mean).square().sum(1)


def values(theta, rewards):
    """V(s) (9, 2) of the policy: what it expects to earn from each state of an episode on."""
    probabilities = theta.softmax(-1).detach()
    first, second = rewards.view(TOKENS, TOKENS, 2).unbind(-1)
    after = (probabilities[1:] * second).sum(1)  # (3,): one for each first token
    start = (probabilities[0] * (first[:, 0] + after)).sum()
    return torch.cat([start[None], after])[STATES]


# The policy gradient


def test_policy_gradient_is_the_gradient_of_the_expected_return():
    theta, rewards = problem()
    returns = rewards.sum(1, keepdim=True).expand(-1, 2)
    close(moments(theta, returns)[0], gradient_of_the_return(theta, rewards))


def test_weights_that_leave_the_expected_gradient_alone():
    """Rewards-to-go; less any function of the state; less the exact value; GAE on exact values, whatever λ."""
    theta, rewards = problem()
    exact, to_go = values(theta, rewards), rewards_to_go(rewards, MASK)
    weights = [to_go, to_go - torch.randn(1 + TOKENS).double()[STATES], to_go - exact]
    weights += [gae(rewards, exact, MASK, gamma=1.0, lam=lam) for lam in (0.0, 0.6, 1.0)]
    for weight in weights:
        close(moments(theta, weight)[0], gradient_of_the_return(theta, rewards))


def test_each_step_to_the_advantage_lowers_the_variance():
    """The rewards are about 2 each, so that the past, and the value of the state, are most of a return."""
    theta, rewards = problem()
    to_go, exact = rewards_to_go(rewards, MASK), values(theta, rewards)
    weights = (rewards.sum(1, keepdim=True).expand(-1, 2), to_go, to_go - exact)
    whole, future, advantage = (moments(theta, weight)[1] for weight in weights)
    assert whole > 1.1 * future
    assert future > 2 * advantage


def test_control_weights_that_change_the_expected_gradient():
    """One t for all tokens (docs/theory.md §3); a baseline that sees the action; λ < 1 and a wrong critic."""
    theta, rewards = problem()
    to_go, wrong = rewards_to_go(rewards, MASK), values(theta, rewards) + torch.randn(1 + TOKENS).double()[STATES]
    of_the_last = to_go[:, 1:].expand(-1, 2)
    of_the_action = to_go - torch.randn(TOKENS).double()[EPISODES]
    for weight in (of_the_last, of_the_action, gae(rewards, wrong, MASK, gamma=1.0, lam=0.5)):
        assert (moments(theta, weight)[0] - gradient_of_the_return(theta, rewards)).abs().max() > 1e-2
    unbiased = gae(rewards, wrong, MASK, gamma=1.0, lam=1.0)
    close(moments(theta, unbiased)[0], gradient_of_the_return(theta, rewards))


def test_gae_keeps_the_values_that_do_not_cancel():
    """Â_t = Σ (γλ)^l [r_{t+l} + γ(1 − λ) V_{t+l+1}] − V_t, with V = 0 after the end."""
    gamma, lam = 0.9, 0.7
    rewards, critic = torch.randn(2, 1, 5, dtype=torch.float64)
    result = gae(rewards, critic, torch.ones(1, 5, dtype=torch.bool), gamma, lam)
    r, v = rewards[0].tolist(), [*critic[0].tolist(), 0.0]
    by_hand = [
        sum((gamma * lam) ** (k - t) * (r[k] + gamma * (1 - lam) * v[k + 1]) for k in range(t, 5)) - v[t]
        for t in range(5)
    ]
    close(result, [by_hand])


def test_clipping_takes_the_gradient_away_and_does_not_bound_the_ratio():
    """One large step from ratio 1 goes past 1 + ε; from there the same action has no gradient."""
    old_logps = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    logits = old_logps.clone().requires_grad_()
    advantages = torch.tensor([1.0, 0.0], dtype=torch.float64)

    def gradient():
        objective = clip_objective(policy_ratio(logits.log_softmax(-1), old_logps), advantages, 0.2)
        return torch.autograd.grad(objective.sum(), logits)[0]

    step = 4 * gradient()
    with torch.no_grad():
        logits += step
    assert policy_ratio(logits.log_softmax(-1), old_logps)[0] > 1.2
    assert (gradient() == 0).all()


# The closed form


BETA = 0.4


def bandit():
    """Rewards (5,), log π_ref (5,), and the log-probabilities (5,) of some other policy."""
    rewards, reference, other = torch.randn(3, 5, dtype=torch.float64)
    return rewards, reference.log_softmax(-1), other.log_softmax(-1)


def kl(logps, other):
    return (logps.exp() * (logps - other)).sum()


def closed_form(rewards, ref_logps, beta):
    """log π* and log Z, from sums over all answers."""
    weights = [p * torch.exp(r / beta) for p, r in zip(ref_logps.exp(), rewards, strict=True)]
    total = sum(weights)
    return torch.stack([weight / total for weight in weights]).log(), total.log()


def gradient_of_the_goal(logps, rewards, ref_logps, beta):
    """The expected gradient of PPO's loss at ratio 1, with β · k2, with respect to the logits."""
    logits = logps.clone().requires_grad_()
    current = logits.log_softmax(-1)
    objective = clip_objective(policy_ratio(current, logps), rewards, 0.2)
    loss = (logps.exp() * (beta * k2(current, ref_logps) - objective)).sum()
    return torch.autograd.grad(loss, logits)[0]


def test_goal_is_a_constant_minus_the_kl_to_the_closed_form():
    rewards, ref_logps, logps = bandit()
    optimum, log_z = closed_form(rewards, ref_logps, BETA)
    goal = logps.exp() @ rewards - BETA * kl(logps, ref_logps)
    close(goal, BETA * log_z - BETA * kl(logps, optimum))


def test_gradient_of_ppo_is_zero_at_the_closed_form_and_nowhere_near():
    rewards, ref_logps, logps = bandit()
    optimum, _ = closed_form(rewards, ref_logps, BETA)
    close(gradient_of_the_goal(optimum, rewards, ref_logps, BETA), torch.zeros(5))
    assert gradient_of_the_goal(logps, rewards, ref_logps, BETA).abs().max() > 1e-2


def test_a_larger_beta_is_a_stronger_leash():
    rewards, ref_logps, _ = bandit()
    distances = [kl(closed_form(rewards, ref_logps, beta)[0], ref_logps).item() for beta in (0.1, 0.3, 1.0, 3.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 10 * distances[-1]


def test_every_reward_is_an_implicit_reward_up_to_a_constant():
    rewards, ref_logps, _ = bandit()
    optimum, log_z = closed_form(rewards, ref_logps, BETA)
    close(implicit_reward(optimum, ref_logps, BETA) + BETA * log_z, rewards)


def test_ppo_on_its_own_implicit_reward_has_no_gradient():
    """For every policy, not only at an optimum; with half of that KL, there is one."""
    _, ref_logps, logps = bandit()
    own = implicit_reward(logps, ref_logps, BETA)
    close(gradient_of_the_goal(logps, own, ref_logps, BETA), torch.zeros(5))
    assert gradient_of_the_goal(logps, own, ref_logps, BETA / 2).abs().max() > 1e-2


def test_ppo_on_the_implicit_reward_of_a_dpo_policy():
    """π ∝ π' · (π_DPO / π_ref)^(β/β'): with π' = π_ref and β' = β the DPO policy; with π' = π_DPO, as far again."""
    _, ref_logps, dpo = bandit()
    reward = implicit_reward(dpo, ref_logps, BETA)
    close(closed_form(reward, ref_logps, BETA)[0], dpo)
    close(gradient_of_the_goal(dpo, reward, ref_logps, BETA), torch.zeros(5))
    further = (dpo.exp().square() / ref_logps.exp()).log().log_softmax(-1)
    close(closed_form(reward, dpo, BETA)[0], further)
    general = (ref_logps.exp() * (dpo.exp() / ref_logps.exp()) ** (BETA / 0.9)).log().log_softmax(-1)
    close(closed_form(reward, ref_logps, 0.9)[0], general)
