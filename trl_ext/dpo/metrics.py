"""`PreferenceLedger`: pairs of a logging window or of an evaluation, over all ranks, and what they say together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..statistics import wilson_interval
from .losses import gradient_weight, preference_probability


# (N,) for each pair: of both completions the implicit reward, the log-ratio to the reference and the log-probability
# under the policy, both in nats, and the tokens.
COLUMNS = (
    *("chosen_rewards", "rejected_rewards", "chosen_logratios", "rejected_logratios"),
    *("chosen_logps", "rejected_logps", "chosen_lengths", "rejected_lengths"),
)
QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
CALIBRATION_BINS = 10
AVERAGED = ("loss", "rewards/", "logps/", "logits/", "entropy", "mean_token_accuracy", "aux_loss")


class PreferenceLedger:
    """Collects pairs; `pop` says what they show, and forgets them."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []
        self._sources: list[str] = []

    def add(self, pairs: Tensor, sources: list[str] | None = None) -> None:
        """Add `pairs` (N, 8), the columns of `COLUMNS` of all ranks, and the `source` of each."""
        self._batches.append(pairs.float().cpu())
        self._sources += sources or []

    def pop(self) -> dict[str, float]:
        """Return the metrics of docs/metrics.md; none when there were no pairs."""
        batches, sources = self._batches, self._sources
        self._batches, self._sources = [], []
        if not batches:
            return {}
        return preference_metrics(dict(zip(COLUMNS, torch.cat(batches).unbind(1), strict=True)), sources)


def preference_metrics(pairs: dict[str, Tensor], sources: Sequence[str] = ()) -> dict[str, float]:
    """Return what pairs say, a tensor (N,) for each of `COLUMNS`; with N sources, also accuracy and pairs of each."""
    chosen, rejected = pairs["chosen_rewards"], pairs["rejected_rewards"]
    margins = chosen - rejected
    right = margins > 0
    low, high = wilson_interval(right.sum().item(), len(right))
    metrics = {
        "preference/accuracy": right.float().mean().item(),
        "preference/accuracy_low": low,
        "preference/accuracy_high": high,
        "preference/pairs": float(len(right)),
        "preference/ranking_accuracy": (pairs["chosen_logps"] > pairs["rejected_logps"]).float().mean().item(),
        "preference/gradient_weight": gradient_weight(chosen, rejected).mean().item(),
        "preference/calibration_error": calibration_error(preference_probability(chosen, rejected)),
    }
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        metrics[f"rewards/{side}_std"] = rewards.std(correction=0).item()
        metrics[f"rewards/{side}_below_zero"] = (rewards < 0).float().mean().item()
        metrics[f"logps/{side}_drift"] = pairs[f"{side}_logratios"].mean().item()
    metrics |= {f"rewards/margins_{name}": margins.quantile(level).item() for name, level in QUANTILES.items()}
    logratios = torch.cat([pairs["chosen_logratios"], pairs["rejected_logratios"]])
    metrics["kl/ref"] = (logratios.square() / 2).mean().item()
    lengths = pairs["chosen_lengths"] - pairs["rejected_lengths"]
    if len(margins) > 1 and margins.std() != 0 and lengths.std() != 0:
        metrics["preference/length_correlation"] = torch.corrcoef(torch.stack([margins, lengths]))[0, 1].item()
    of_source: dict[str, list[float]] = {}  # in one pass: there may be as many sources as pairs
    for source, is_right in zip(sources, right.tolist() if sources else [], strict=True):
        of_source.setdefault(source, []).append(float(is_right))
    for name, of in sorted(of_source.items()):
        metrics |= {f"preference/accuracy/{name}": sum(of) / len(of), f"preference/pairs/{name}": float(len(of))}
    return metrics


def pooled(sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """
    Return means over held-out sets, by the prefix of their names, weighted by their pairs, of what TRL averages
    itself: the loss, rewards, log-probs and logits. What is no mean, such as a quantile, comes from a ledger of all
    pairs.
    """
    names = [{key.removeprefix(prefix) for key in metrics} for prefix, metrics in sets.items()]
    shared = sorted(name for name in set.intersection(*names) if name.startswith(AVERAGED)) if names else []
    pairs = {prefix: metrics[f"{prefix}preference/pairs"] for prefix, metrics in sets.items()}
    return {
        name: sum(metrics[prefix + name] * pairs[prefix] for prefix, metrics in sets.items()) / sum(pairs.values())
        for name in shared
    }


def calibration_error(probabilities: Tensor) -> float:
    """
    Expected calibration error of Bradley-Terry: the mean distance, over bins of the confidence max(p, 1 − p), between
    the confidence and the share of pairs in which people agreed (Guo et al. 2017 eq. 3).

    Args:
        probabilities (N,): P(chosen ≻ rejected) under the policy.
    """
    confidence = torch.maximum(probabilities, 1 - probabilities)
    right = (probabilities > 0.5).float()
    bins = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    counts = torch.zeros(CALIBRATION_BINS).index_add_(0, bins, torch.ones_like(confidence))
    gaps = torch.zeros(CALIBRATION_BINS).index_add_(0, bins, confidence - right)
    return (gaps.abs().sum() / counts.sum()).item()
