"""From one score per sequence to one reward per token: EOS penalty, clipping, normalisation, KL penalty.

Symbols: B sequences, T response tokens; `scores` is (B,), in the unit of the reward model; `mask` is (B, T) bool, True
= counts.
"""

import torch
from torch import Tensor

from ..masked import AllReduce, identity, masked_moments, require_shape, zero_masked


def weighted_scores(rewards: Tensor, weights: Tensor) -> Tensor:
    """One score per sequence: the weighted sum of what the reward sources said.

    Σ_k weights_k · rewards_k, (B, K) to (B,), over the sources that apply; NaN, "does not apply", where none does
    """
    scores = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return scores.masked_fill(rewards.isnan().all(dim=1), torch.nan)


def token_rewards(scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0) -> Tensor:
    """Scores and KL penalties as rewards: a score is paid at the last token, the KL at each (Ziegler 2019, eq. 2).

    r_t = score · [t is the last token that counts] − kl_coef · kl_t, (B, T), in the unit of the score; 0 where masked

    `kl` is (B, T) in nats per token, or None. A sequence without tokens that count has no place for its score: all 0.
    """
    rewards = torch.where(last_token(mask), scores.unsqueeze(1), 0)
    if kl is None:
        return rewards
    require_shape(mask, kl=kl)
    return rewards - kl_coef * zero_masked(kl, mask)


def last_token(mask: Tensor) -> Tensor:
    """True at the last position that counts of each sequence; nowhere in a sequence without one. (B, T) bool."""
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

    score / sqrt(variance), unchanged while fewer than two scores, or no spread, have been seen

    The mean is kept. Subtracting it would add nothing, since the critic takes a constant out of the advantages; but it
    moves from rollout to rollout, and the critic would chase it, and a score would change sign against the quantities
    that stay where they are: the 0 of a token without a score, the EOS penalty, the KL.
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
        """Take in the `scores`, (B,), of all ranks; `scored`, (B,) bool, leaves out samples without one.

        A sample that no reward function scored is nan, and counts for nothing.
        """
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
        """Return what `load_state_dict` takes, for a checkpoint: count, mean and variance."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from what `state_dict` gave."""
        self.count, self.mean, self.variance = state["count"], state["mean"], state["variance"]
