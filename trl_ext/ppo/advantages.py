"""Rewards-to-go, TD errors, n-step and generalised advantages, which say how much better an action was than expected.

Symbols: B sequences, T response tokens; `rewards`, `values`, `mask` are (B, T), `mask` bool, True = counts. Masks are
ragged and may have holes (tokens the policy did not write, such as a tool's answer): the token after t is the next one
that counts. An episode ends with its last counted token, and the value after it is 0. Results are 0 where `mask` is
False. Rewards, values and advantages are in units of the score.

A new estimator is a function and a line in `ESTIMATORS`.
"""

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..masked import require_shape, zero_masked


Estimator = Callable[[Tensor, Tensor, Tensor, float, float | Tensor], tuple[Tensor, Tensor]]
"""From (rewards, values, mask, gamma, lam) to (advantages, returns), all (B, T); `lam` a number or (B,)."""


def rewards_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from here to the end of the episode (docs/theory.md §3).

    G_t = r_t + gamma · G_{t+1}: the generalised advantage of a critic that says 0 everywhere, with lam = 1.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, lam=1.0)


def td_error(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """One-step surprise of the critic (Schulman 2015, arXiv:1506.02438, §3).

    δ_t = r_t + gamma · V_{t+1} − V_t
    """
    require_shape(mask, rewards=rewards, values=values)
    return _without_holes(lambda r, v: r + gamma * _shift_left(v, 1) - v, mask, rewards, values)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman 2015, arXiv:1506.02438, eq. 16).

    Â_t = δ_t + gamma · lam · Â_{t+1}, with one `lam` or one per sequence (B,)

    lam = 0 is the TD error, lam = 1, and no other, is rewards-to-go minus value.
    """
    deltas = td_error(rewards, values, mask, gamma)
    return _without_holes(lambda delta: _discounted_sums(delta, gamma * lam), mask, deltas)


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """λ of each sequence by its length, for the actor's advantages (VAPO, arXiv:2504.05118, length-adaptive GAE).

    λ = 1 − 1 / (alpha · l), l the tokens that count, within 0 and 1, (B,): `alpha · l` is the horizon in tokens
    """
    return (1 - 1 / (alpha * mask.sum(dim=1).clamp(min=1))).clamp(0, 1)


def n_step_advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, n: int) -> Tensor:
    """n rewards, then the critic (Schulman 2015, arXiv:1506.02438, eq. 14).

    Â_t = r_t + … + gamma^(n−1) · r_{t+n−1} + gamma^n · V_{t+n} − V_t = Σ_{k<n} gamma^k · δ_{t+k}

    n = 1 is the TD error; n of the episode's length or more is rewards-to-go minus value.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-step advantage needs at least one reward: choose n >= 1.")
    deltas = td_error(rewards, values, mask, gamma)
    steps = range(min(n, mask.shape[1]))
    return _without_holes(
        lambda delta: sum((gamma**k * _shift_left(delta, k) for k in steps), torch.zeros_like(delta)), mask, deltas
    )


def value_targets(advantages: Tensor, old_values: Tensor) -> Tensor:
    """Return the targets that the critic is trained to predict (docs/theory.md §5).

    V_target = Â + V_old, per token
    """
    return advantages + old_values


def estimate_advantages(
    estimator: str,
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    critic_lam: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return advantages and the returns that the critic is trained on, both (B, T).

    `estimator` is a name in `ESTIMATORS`, or `<n>_step`, such as `1_step` or `3_step`. With `critic_lam` the returns
    are those of generalised advantages with that λ (decoupled GAE: VC-PPO, arXiv:2503.01491).
    """
    advantages, returns = find_estimator(estimator)(rewards, values, mask, gamma, lam)
    if critic_lam is not None:
        returns = value_targets(gae(rewards, values, mask, gamma, critic_lam), values)
    return advantages, zero_masked(returns, mask)


def find_estimator(name: str) -> Estimator:
    """Return the estimator of that name; raise `ValueError` for an unknown one."""
    if str(name) in ESTIMATORS:
        return ESTIMATORS[name]
    if re.fullmatch(r"[1-9]\d*_step", str(name)):
        return partial(_n_step, n=int(name.removesuffix("_step")))
    raise ValueError(
        f"The advantage estimator is {name!r}; choose one of {', '.join(ESTIMATORS)} or <n>_step, with n a whole "
        "number of at least 1, for example '3_step'."
    )


def _gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    advantages = gae(rewards, values, mask, gamma, lam)
    return advantages, value_targets(advantages, values)


def _n_step(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor, *, n: int
) -> tuple[Tensor, Tensor]:
    advantages = n_step_advantages(rewards, values, mask, gamma, n)
    return advantages, value_targets(advantages, values)


def _reinforce(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    to_go = rewards_to_go(rewards, mask, gamma)
    return to_go, to_go


def _reinforce_baseline(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor
) -> tuple[Tensor, Tensor]:
    return _gae(rewards, values, mask, gamma, lam=1.0)


ESTIMATORS: dict[str, Estimator] = {
    "gae": _gae,
    "reinforce": _reinforce,
    "reinforce_baseline": _reinforce_baseline,
}
"""
By name. `gae`: generalised advantages. `reinforce`: rewards-to-go, not centred by a critic.
`reinforce_baseline`: rewards-to-go minus value, which is `gae` with lam = 1. Beside them, `<n>_step`: n
rewards, then the critic. Only `gae` reads `lam`.
"""


def _without_holes(function: Callable[..., Tensor], mask: Tensor, *tensors: Tensor) -> Tensor:
    """Apply `function` to the tokens that count, moved to the front with zeros behind, and move the results back."""
    order = torch.argsort((~mask).int(), dim=1, stable=True)
    result = function(*(zero_masked(tensor, mask).gather(1, order) for tensor in tensors))
    return torch.zeros_like(result).scatter(1, order, result)


def _shift_left(sequence: Tensor, steps: int) -> Tensor:
    """Return x_{t+steps} at t, and 0 past the end. (B, T) to (B, T)."""
    return torch.nn.functional.pad(sequence[:, steps:], (0, steps))


def _discounted_sums(sequence: Tensor, discount: float | Tensor) -> Tensor:
    """Return s_t = x_t + discount · s_{t+1}, with 0 past the end. (B, T) to (B, T); one discount, or (B,)."""
    sums = torch.zeros_like(sequence)
    running = sequence.new_zeros(len(sequence))
    for t in reversed(range(sequence.shape[1])):
        running = sequence[:, t] + discount * running
        sums[:, t] = running
    return sums
