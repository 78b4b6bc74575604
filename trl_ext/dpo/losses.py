"""
The mathematics of DPO: implicit reward, Bradley-Terry, the loss and how strongly a pair pulls (Rafailov et al. 2023,
arXiv:2305.18290). Pure: torch only. Per pair; means are the caller's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def implicit_reward(logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """
    r(x, y) = β log(π_θ(y|x) / π_ref(y|x)), up to β log Z(x), which cancels in a pair (Rafailov 2023 eq. 5).

    Args:
        logps, ref_logps (B,): log-probabilities of whole completions, sums over their tokens, nats.
        beta: β > 0; larger is a shorter leash to π_ref.
    """
    return beta * (logps - ref_logps)


def preference_probability(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Bradley-Terry: P(y_w ≻ y_l) = σ(r_w − r_l), per pair (Bradley & Terry 1952)."""
    return torch.sigmoid(chosen_rewards - rejected_rewards)


def dpo_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """
    −(1 − ε) log σ(m) − ε log σ(−m) with the margin m = r̂_w − r̂_l, per pair (Rafailov 2023 eq. 7; with ε > 0
    conservative DPO, Mitchell 2023: a share ε of the labels is taken to be flipped).

    Args:
        chosen_rewards, rejected_rewards (B,): implicit rewards r̂.
        label_smoothing: ε in [0, 0.5).
    """
    margins = chosen_rewards - rejected_rewards
    return -F.logsigmoid(margins) + smoothing_term(margins, label_smoothing)


def smoothing_term(margins: Tensor, label_smoothing: float) -> Tensor:
    """Return what label smoothing adds to −log σ(m) of score differences m (B,): ε·m, as log σ(m) − log σ(−m) = m."""
    return label_smoothing * margins


def gradient_weight(chosen_rewards: Tensor, rejected_rewards: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """
    σ(r̂_l − r̂_w) − ε = −∂loss/∂m, per pair: how wrong the pair still is (Rafailov 2023 §4). Times β it scales
    ∇log π(y_w) − ∇log π(y_l). 1/2 − ε where the policy is the reference.
    """
    return torch.sigmoid(rejected_rewards - chosen_rewards) - label_smoothing


def divergence_score(logratios: Tensor, f_divergence: str, alpha: float = 0.5) -> Tensor:
    """
    f'(π_θ/π_ref), which takes the place of the log-ratio when the leash is another f-divergence than the reverse KL
    (Wang et al. 2024, f-DPO; the names are TRL's).

    Args:
        logratios (B,): log π_θ/π_ref of whole completions.
        f_divergence: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        alpha: of the α-divergence; at 1 it is the reverse KL.
    """
    if f_divergence == "forward_kl":
        return 1 - torch.exp(-logratios)
    if f_divergence == "js_divergence":
        return F.logsigmoid(logratios) + math.log(2)
    if f_divergence == "alpha_divergence" and abs(alpha - 1) >= 1e-6:
        # 80: the largest exponent that float32 and bfloat16 can hold.
        return torch.expm1(((alpha - 1) * logratios).clamp(max=80)) / (alpha - 1)
    return logratios
