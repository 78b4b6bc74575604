"""From one score per sequence to one reward per token: EOS penalty, clipping, normalisation, KL penalty.

Symbols: B sequences, T response tokens; `scores` is (B,), in the unit of the reward model; `mask` is (B, T) bool, True
= counts.
"""

import torch
from torch import Tensor

from ..masked import AllReduce, identity, masked_moments, require_shape, zero_masked


def weighted_scores(rewards: Tensor, weights: Tensor) -> Tensor:
    """One score per sequence: the weighted sum over the reward sources that apply.

    Σ_k weights_k · rewards_k, (B, K) to (B,); NaN, "does not apply", if no source does
    """
    scores = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return scores.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Rewards per token: the score at the last token, minus the KL at every token (Ziegler 2019, eq. 2).

    r_t = score · [t is the last token that counts] − kl_coef · kl_t, (B, T), in the unit of the score; 0 where masked

    `kl` is (B, T) in nats per token, or None. A sequence without tokens that count has rewards of 0.
    """
    rewards = torch.where(last_token(mask), scores.unsqueeze(1), 0)
    if kl is None:
        return rewards
    require_shape(mask, kl=kl)
    return rewards - kl_coef * zero_masked(kl, mask)


def last_token(mask: Tensor) -> Tensor:
    """True at the last position of each sequence that counts, if one does. (B, T) bool."""
    counted_from_here = mask.flip(1).cumsum(1).flip(1)
    return mask & (counted_from_here == 1)


def missing_eos(scores: Tensor, has_eos: Tensor, penalty: float) -> Tensor:
    """Scores less `penalty` where a response has no EOS (TRL's `missing_eos_penalty`). `has_eos` is (B,) bool."""
    return torch.where(has_eos, scores, scores - penalty)


def clip_scores(scores: Tensor, limit: float) -> Tensor:
    """clip(score, −limit, limit), (B,)."""
    if limit <= 0:
        raise ValueError(f"limit is {limit}; a clipped score needs a range above 0: set it above 0, or do not clip.")
    return scores.clamp(-limit, limit)


def normalize_scores(scores: Tensor, moments: "RunningMoments") -> Tensor:
    """Scores divided by the running standard deviation, (B,), no unit.

    score / sqrt(variance), unchanged until two different scores have been seen

    The mean is kept. Subtracting it would gain nothing, since the critic takes a constant out of the advantages. But
    the mean moves from rollout to rollout, and the critic would have to follow it. And scores would change sign
    relative to what does not move: the 0 of a token without a score, the EOS penalty, the KL.
    """
    return scores / moments.std if moments.count >= 2 and moments.variance > 0 else scores


class RunningMoments:
    """Count, mean and population variance of all scores seen so far, on all ranks.

    Batches are joined by the parallel form of Welford's update (Chan, Golub & LeVeque 1979): with δ = mean_b − mean,

    n ← n + n_b;  mean ← mean + δ · n_b / n;  variance ← (n_a · var + n_b · var_b + δ² · n_a · n_b / n) / n
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.variance = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation, in the unit of the score."""
        return self.variance**0.5

    def update(self, scores: Tensor, scored: Tensor | None = None, all_reduce: AllReduce = identity) -> None:
        """Add the `scores`, (B,), of all ranks, without those where `scored`, (B,) bool, is False; they may be nan."""
        scored = torch.ones_like(scores, dtype=torch.bool) if scored is None else scored
        require_shape(scored, scores=scores)
        count, mean, variance = (moment.item() for moment in masked_moments(scores, scored, all_reduce))
        total = self.count + count
        if total == 0:
            return
        delta = mean - self.mean
        squares = self.count * self.variance + count * variance + delta**2 * self.count * count / total
        self.count, self.mean, self.variance = total, self.mean + delta * count / total, squares / total

    def state_dict(self) -> dict[str, float]:
        """Return count, mean and variance, for a checkpoint."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from what `state_dict` gave."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]
