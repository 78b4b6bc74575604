"""From the scores of a rollout to its advantages and returns, and the log entries of both."""

import math

import torch
from torch import Tensor
from transformers.utils import logging

from ..masked import AllReduce, explained_variance, masked_moments, masked_sum, masked_whiten, zero_masked
from .advantages import estimate_advantages, length_adaptive_lam, rewards_to_go
from .config import PPOConfigX
from .kl import estimate_kl
from .metrics import scores_by_prompt
from .rewards import RunningMoments, clip_scores, missing_eos, normalize_scores, token_rewards
from .rollout import Rollout


logger = logging.get_logger(__name__)


def estimate_returns(
    rollout: Rollout, args: PPOConfigX, kl_coef: float, moments: RunningMoments, all_reduce: AllReduce
) -> tuple[Tensor, dict[str, float]]:
    """
    Fill in `rewards`, `advantages` and `returns` (docs/theory.md §4, §5). Returns use the advantages before whitening.

    Args:
        rollout: with `old_values`, and with `old_logps` and `ref_logps` if the KL is in the reward.
        kl_coef: coefficient of the KL in the reward, unused when it is in the loss.
        moments: running moments of the scores, updated if `normalize_rewards`.

    Returns:
        (B,) sum of each response's per-token rewards, before whitening, and log entries of the critic, NaN for what
        nothing can be said of.
    """
    # 1. One score per response, and what is paid at tokens: normalised, clipped, less where the end token is missing
    mask, scores, paid = rollout.mask, rollout.scores, rollout.paid
    if args.normalize_rewards:
        moments.update(scores, rollout.scored, all_reduce=all_reduce)
        scores = normalize_scores(scores, moments)
        paid = None if paid is None else normalize_scores(paid, moments)
    if paid is not None:  # it holds all of the scores
        scores = torch.zeros_like(scores)
    if args.reward_clip is not None:
        scores = clip_scores(scores, args.reward_clip)
    if args.missing_eos_penalty is not None:
        scores = missing_eos(scores, rollout.has_eos, args.missing_eos_penalty)
    # 2. One reward per token
    kl = None
    if args.needs_reference and args.kl_placement == "reward":
        kl = estimate_kl(args.kl_estimator, rollout.old_logps, rollout.ref_logps, mask)
    rewards = token_rewards(scores, mask, kl, kl_coef, paid)
    total = masked_sum(rewards, mask, dim=1)
    if args.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, all_reduce=all_reduce)
    rollout.rewards = rewards
    # 3. Advantages and returns
    lam: float | Tensor = args.lam
    if args.lam_alpha is not None:
        lam = length_adaptive_lam(mask, args.lam_alpha)
        _warn_of_short_horizons(lam, mask, args.lam_alpha, all_reduce)
    rollout.advantages, rollout.returns = estimate_advantages(
        args.advantage_estimator, rewards, rollout.old_values, mask, args.gamma, lam, args.critic_lam
    )
    # 4. What the critic knows of the rewards to come
    to_go = rewards_to_go(rewards, mask, args.gamma)
    explained = explained_variance(rollout.old_values, to_go, mask, all_reduce).item()
    measured = {"value/explained_variance_mc": explained}
    measured |= _errors_by_place(rollout.old_values, to_go, mask, all_reduce)
    if args.critic_gate:
        measured["value/gate"] = float(explained > 0)
        if not explained > 0:
            _, mean, _ = masked_moments(to_go, mask, all_reduce)
            rollout.advantages = zero_masked(to_go - mean, mask)
    if args.whiten_advantages:
        rollout.advantages = masked_whiten(rollout.advantages, mask, all_reduce=all_reduce)
    return total, measured


def _errors_by_place(values: Tensor, to_go: Tensor, mask: Tensor, all_reduce: AllReduce) -> dict[str, float]:
    """Return the root mean square of G − V over the first and the last quarter of every response's tokens."""
    place = (mask.cumsum(1) - 1) / mask.sum(1, keepdim=True).clamp(min=1)  # from 0 to below 1
    errors = {}
    for name, there in (("early", place < 0.25), ("late", place >= 0.75)):
        count, mean, _ = masked_moments((to_go - values).square(), mask & there, all_reduce)
        errors[f"value/rmse_{name}"] = mean.sqrt().item() if count > 0 else math.nan
    return errors


def _warn_of_short_horizons(lam: Tensor, mask: Tensor, alpha: float, all_reduce: AllReduce) -> None:
    _, share, _ = masked_moments((lam == 0).float(), mask.any(dim=1), all_reduce)
    if share >= 0.25:
        logger.warning_once(
            f"`lam_alpha={alpha}` gives a quarter or more of a rollout's responses λ = 0: they have at most "
            f"{math.floor(1 / alpha)} tokens, and their advantages look one token ahead. Raise `lam_alpha` for "
            "responses as short as these."
        )


def sequence_kl(old_logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Return KL(π_old ‖ π_ref) of each response, k1 summed over its tokens, (B,), nats; NaN if no token counts."""
    per_token = estimate_kl("k1", old_logps, ref_logps, mask)
    return masked_sum(per_token, mask, dim=1).masked_fill(~mask.any(dim=1), torch.nan)


def rollout_metrics(
    rollout: Rollout, total: Tensor, all_reduce: AllReduce, num_generations: int = 1
) -> dict[str, float]:
    """
    Return the log entries of a rollout over all ranks, NaN for a mean of nothing. `total` is what `estimate_returns`
    returned; the `num_generations` responses to a prompt stand side by side.
    """
    num_scored, score, _ = masked_moments(rollout.scores, rollout.scored, all_reduce)
    num_taught, reward, _ = masked_moments(total, rollout.mask.any(dim=1), all_reduce)
    num_tokens, mean, variance = masked_moments(rollout.advantages, rollout.mask, all_reduce)
    explained = explained_variance(rollout.old_values, rollout.returns, rollout.mask, all_reduce)
    measured = {
        "reward/score": (score, num_scored),
        "reward/total": (reward, num_taught),
        "advantage/mean": (mean, num_tokens),
        "advantage/std": (variance.sqrt(), num_tokens),
        "value/explained_variance": (explained, num_tokens),
    }
    if num_generations > 1:
        scores = rollout.scores.masked_fill(~rollout.scored, torch.nan)
        for name, of_prompts in scores_by_prompt(scores, num_generations).items():
            count, mean, _ = masked_moments(of_prompts.nan_to_num(), ~of_prompts.isnan(), all_reduce)
            measured[f"reward/{name}"] = (mean, count)
    return {name: value.item() if count > 0 else math.nan for name, (value, count) in measured.items()}
