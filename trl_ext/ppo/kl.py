"""KL divergences: estimators per token, and the exact sum over the vocabulary.

Symbols: B sequences, T response tokens, N any tokens, V vocabulary, H hidden size; `logps`, `ref_logps`, `old_logps`
are the (B, T) log-probabilities of the sampled tokens under the policy, the reference and the policy that sampled
them. Everything is in nats. KL(π_θ ‖ π_ref) is the distance to the reference; KL[π_old ‖ π_θ] measures one update:
two quantities, two coefficients.

What an estimator does depends on where it stands. In the reward its value counts: k1 and k3 are unbiased, k2 is not.
In the loss its gradient counts, in expectation over tokens sampled from π_θ: k1 gives 0, k2 gives ∇KL(π_θ ‖ π_ref), k3
gives ∇KL(π_ref ‖ π_θ). Multiplied by the ratio π_θ / π_old, k1 and k3 give ∇KL(π_θ ‖ π_ref), also from samples of
π_old.

A new estimator is a function and a line in `IN_THE_LOSS`, `IN_THE_REWARD` or both.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..masked import zero_masked


LMHead = Callable[[Tensor], Tensor]
"""(n, H) hidden states to (n, V) logits, already divided by the sampling temperature."""


def k1(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio estimate of KL(π_θ ‖ π_ref): unbiased, of either sign (Schulman 2020, "Approximating KL Divergence").

    logps − ref_logps, (B, T), nats per token. Its gradient is zero in expectation: it belongs in the reward.
    """
    return logps - ref_logps


def k2(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Squared log-ratio estimate of KL(π_θ ‖ π_ref): biased, small and never negative (Schulman 2020).

    ½ (logps − ref_logps)², (B, T), nats per token. Its expected gradient is that of KL(π_θ ‖ π_ref): the choice for
    the loss.
    """
    return 0.5 * (logps - ref_logps).square()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Bregman estimate of KL(π_θ ‖ π_ref): unbiased and never negative (Schulman 2020; GRPO, arXiv:2402.03300, eq. 4).

    exp(ref_logps − logps) − 1 − (ref_logps − logps), (B, T), nats per token. Its expected gradient is that of the
    reverse direction, KL(π_ref ‖ π_θ).
    """
    return torch.expm1(ref_logps - logps) - (ref_logps - logps)


# The estimators by where they may stand; `full_kl` may stand in the loss, too.
IN_THE_LOSS = {"k2": k2, "k3": k3}
IN_THE_REWARD = {"k1": k1, "k2": k2, "k3": k3}


def estimate_kl(estimator: str, logps: Tensor, ref_logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(π_θ ‖ π_ref) per token by the estimator of that name, such as "k1". (B, T), nats.

    With `mask` (bool, True = counts) the other positions give 0 and no gradient. Without it k3 may overflow at a
    padded position, and an infinite value gives a nan gradient even where it is masked afterwards.
    """
    estimators = IN_THE_REWARD | IN_THE_LOSS
    if estimator not in estimators:
        raise ValueError(f"The KL estimator is {estimator!r}; choose one of {', '.join(estimators)}.")
    if mask is not None:
        logps, ref_logps = zero_masked(logps, mask), zero_masked(ref_logps, mask)
    return estimators[estimator](logps, ref_logps)


def old_policy_kl(logps: Tensor, old_logps: Tensor) -> Tensor:
    """KL[π_old ‖ π_θ], how far an update has moved the policy (Schulman 2017, arXiv:1707.06347, §4).

    (ratio − 1) − log ratio, with ratio = exp(logps − old_logps), (B, T), nats per token. Tokens come from π_old, so
    this is unbiased, and so is its gradient. It is k3 with the roles of the two policies exchanged.
    """
    return k3(old_logps, logps)


def full_kl(
    hidden: Tensor, lm_head: LMHead, ref_hidden: Tensor, ref_lm_head: LMHead, chunk_size: int = 1024
) -> Tensor:
    """KL(π_θ ‖ π_ref) at each token, summed over the whole vocabulary instead of estimated from the sampled token.

    Σ_v p_v (log p_v − log ref_p_v), (N,), nats per token

    `hidden` is (N, H) and `ref_hidden` (N, H'), as the two models may differ in width; logits are finite. Only
    `chunk_size` tokens have logits at a time, and each chunk is computed again in the backward pass. The gradient
    reaches `hidden` and the parameters of `lm_head`, never the reference.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; at least 1 token per chunk is needed.")
    if len(hidden) != len(ref_hidden):
        raise ValueError(
            f"hidden has {len(hidden)} tokens and ref_hidden {len(ref_hidden)}; both need one row for each token."
        )

    def chunk_kl(states: Tensor, ref_states: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logps = _log_softmax(ref_lm_head(ref_states))
        logps = _log_softmax(lm_head(states))
        return (logps.exp() * (logps - ref_logps)).sum(-1)

    chunks = zip(hidden.split(chunk_size), ref_hidden.detach().split(chunk_size), strict=True)
    return torch.cat([checkpoint(chunk_kl, *chunk, use_reentrant=False) for chunk in chunks])


def _log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last dimension, in float32 or wider."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
