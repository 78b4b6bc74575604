"""From the reward sources to one reward per token: weights, EOS penalty, clipping, normalisation, KL penalty.

Symbols: B sequences, T response tokens, K reward sources; `scores` is (B,), in the unit of the reward model; `mask` is
(B, T) bool, True = counts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..masked import AllReduce, identity, masked_moments, require_shape, zero_masked


def weighted_scores(rewards: Tensor, weights: Tensor) -> Tensor:
    """One score per sequence, or per token: the weighted sum over the reward sources that apply.

    Σ_k weights_k · rewards_k, (…, K) to (…); NaN, "does not apply", if no source does
    """
    scores = (rewards * weights.to(rewards.device)).nansum(dim=-1)
    return scores.masked_fill(rewards.isnan().all(dim=-1), torch.nan)


def weighted_tokens(
    rewards: Tensor, by_token: Mapping[int, list[list[float] | None]], lengths: Tensor, weights: Tensor
) -> Tensor:
    """Rewards where the sources pay them: at a response's last token, or at the tokens that a source has named.

    Σ_k weights_k · r_kt, (B, T), with T the longest response

    Args:
        rewards: (B, K), NaN where a source does not apply.
        by_token: source -> for each response one reward for each of its tokens, or None: its reward is a score.
        lengths: (B,) tokens of each response.
    """
    placed = rewards.new_zeros(len(rewards), int(lengths.max()), rewards.size(1))
    placed[torch.arange(len(rewards), device=rewards.device), lengths - 1] = rewards.nan_to_num(nan=0.0)
    for source, responses in by_token.items():
        for row, tokens in enumerate(responses):
            if tokens is not None:
                placed[row, : len(tokens), source] = rewards.new_tensor(tokens)
    return weighted_scores(placed, weights)


def paid_where_it_counts(rewards: Tensor, mask: Tensor) -> Tensor:
    """Move what falls on a token that does not count to the last one before it that does, or to the first that does.

    (B, T) to (B, T), 0 where `mask` is False; a sequence without tokens that count is paid nothing.
    """
    positions = torch.arange(mask.size(1), device=mask.device).expand_as(mask)
    before = positions.masked_fill(~mask, -1).cummax(dim=1).values
    first = mask.int().argmax(dim=1, keepdim=True)
    moved = torch.zeros_like(rewards).scatter_add(1, torch.where(before < 0, first, before), rewards)
    return zero_masked(moved, mask)


def token_rewards(
    scores: Tensor, mask: Tensor, kl: Tensor | None = None, kl_coef: float = 0.0, paid: Tensor | None = None
) -> Tensor:
    """Rewards per token: the score at the last token, minus the KL at every token (Ziegler 2019, eq. 2).

    r_t = paid_t + score · [t is the last token that counts] − kl_coef · kl_t, (B, T), in the unit of the score;
    0 where masked

    `kl` is (B, T) in nats per token, or None. `paid` is (B, T), what is paid at single tokens beside the score, or
    None. A sequence without tokens that count has rewards of 0.
    """
    rewards = torch.where(last_token(mask), scores.unsqueeze(1), 0)
    if paid is not None:
        require_shape(mask, paid=paid)
        rewards = zero_masked(paid, mask) + rewards
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
    """Scores, or rewards per token, divided by the running standard deviation of the scores, no unit.

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
