"""The bandit of kl_estimators.py and equivalence.py: one state, eight answers of one token, a reward for each.

The goal of PPO with a KL penalty, E[r] − β KL(π_θ ‖ π_ref), is highest at π* ∝ π_ref · exp(r / β). Every expectation
is a sum over the eight answers under the current policy, so that there is no noise.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trl_ext.ppo.kl import full_kl
from trl_ext.ppo.losses import clip_objective, policy_ratio


Estimator = Callable[[Tensor, Tensor], Tensor]
REWARDS = torch.tensor([-0.6, -0.3, 0.0, 0.2, 0.4, 0.6, 0.9, 1.2], dtype=torch.float64)
REF_LOGPS = torch.tensor([0.18, 0.22, 0.20, 0.14, 0.10, 0.08, 0.05, 0.03], dtype=torch.float64).log()


def exact_kl(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """KL(π_θ ‖ π_ref), one number; log-probabilities serve as hidden states, and the head passes them through."""
    return full_kl(logps[None], lambda x: x, ref_logps[None], lambda x: x)


def optimum(beta: float) -> Tensor:
    """log π* with π* ∝ π_ref · exp(r / β): the maximum of E[r] − β KL(π_θ ‖ π_ref)."""
    return (REF_LOGPS + REWARDS / beta).log_softmax(-1)


def expected_loss(logits: Tensor, kl: Estimator, beta: float, rewards: Tensor = REWARDS) -> Tensor:
    """E[−clip_objective + β · kl] over answers drawn from the current policy, which as a sampler has no gradient."""
    logps = logits.log_softmax(-1)
    sampler = logps.detach().exp()
    advantages = rewards - sampler @ rewards
    objective = clip_objective(policy_ratio(logps, logps.detach()), advantages, cliprange=0.2)
    return (sampler * (beta * kl(logps, REF_LOGPS) - objective)).sum()


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, learning_rate: float) -> list[Tensor]:
    """Return what gradient descent on `loss` goes through: `start`, and the parameters after every step."""
    history = [start]
    for _ in range(steps):
        parameters = history[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(parameters), parameters)
        history.append(parameters.detach() - learning_rate * gradient)
    return history


def train_ppo(kl: Estimator, beta: float, steps: int, learning_rate: float, rewards: Tensor = REWARDS) -> list[Tensor]:
    """Log-probabilities before every step of gradient descent from π_ref, and after the last."""
    history = descend(lambda logits: expected_loss(logits, kl, beta, rewards), REF_LOGPS, steps, learning_rate)
    return [logits.log_softmax(-1) for logits in history]
