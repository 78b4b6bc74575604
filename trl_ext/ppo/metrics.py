"""
The log. `LossLedger` sums the loss terms of micro-batches to optimizer steps and averages these over a logging window;
`held_out_score` and `held_out_responses` summarise an evaluation. What was not measured is left out of a line, as a 0
would look like a measurement.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor

from ..masked import AllReduce
from ..statistics import half_width
from .losses import PPOTerms
from .terms import WEIGHTED, PPOCoefficients


# The fields that add up over micro-batches and ranks.
ADDITIVE = [term.name for term in fields(PPOTerms) if term.name not in ("total", "ratio_max")]

# Statistic -> log key. All are means over the tokens of the optimizer batch.
STATISTICS = {
    "ratio_mean": "policy/ratio_mean",
    "clip_fraction": "policy/clip_fraction",
    "old_kl": "policy/approx_kl",
    "value_clip_fraction": "value/clip_fraction",
}


class LossLedger:
    """
    Sums of the loss terms, from which log lines are made. `loss = −clip_objective + Σ coef/x · x` holds for every log
    line, because a window's `coef/x` is mean(coef · x) / mean(x) over the optimizer steps taken.
    """

    def __init__(self) -> None:
        self._micro_batches: list[PPOTerms] = []
        self._window: list[dict[str, float]] = []
        self._coefficients: list[dict[str, float]] = []
        self._loss_of_run, self._steps_of_run = 0.0, 0

    def add(self, terms: PPOTerms) -> None:
        """Add one micro-batch. The terms are shares of the optimizer batch's mean, so they add up."""
        self._micro_batches.append(terms)

    def close_step(
        self, coef: PPOCoefficients, all_reduce: AllReduce, max_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Sum the micro-batches of an optimizer step over all ranks, and return the step's terms and statistics."""
        names = [name for name in ADDITIVE if getattr(self._micro_batches[0], name) is not None]
        sums = [sum(getattr(terms, name).detach() for terms in self._micro_batches) for name in names]
        ratio_max = torch.stack([terms.ratio_max for terms in self._micro_batches]).max()
        step = dict(zip(names, all_reduce(torch.stack(sums)).tolist(), strict=True))
        step["ratio_max"] = max_over_ranks(ratio_max).item()
        self._micro_batches.clear()
        self._window.append(step)
        self._coefficients.append(asdict(coef))
        weighted = (coef.of(term) * step[term.name] for term in WEIGHTED if term.name in step)
        self._loss_of_run += -step["clip_objective"] + sum(weighted)
        self._steps_of_run += 1
        return step

    def add_norms(self, norms: dict[str, float]) -> None:
        """Add the norm of the gradient of the optimizer step that was closed last, by role."""
        self._window[-1] |= {f"grad_norm/{role}": norm for role, norm in norms.items()}

    @property
    def mean_loss(self) -> float | None:
        """The mean loss of the optimizer steps since the run began, also before it was resumed; `None` without one."""
        return self._loss_of_run / self._steps_of_run if self._steps_of_run else None

    def state_dict(self) -> dict[str, Any]:
        """Return the open window and the run's loss, for a checkpoint, which is written between optimizer steps."""
        of_run = {"loss_of_run": self._loss_of_run, "steps_of_run": self._steps_of_run}
        return {"window": self._window, "coefficients": self._coefficients, **of_run}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._window, self._coefficients = list(state["window"]), list(state["coefficients"])
        self._loss_of_run, self._steps_of_run = state["loss_of_run"], state["steps_of_run"]

    def pop_window(self) -> dict[str, float]:
        """Return the log line of the optimizer steps since the last call; empty without one."""
        steps, coefficients = self._window, self._coefficients
        self._window, self._coefficients = [], []
        if not steps:
            return {}
        line = {"loss": 0.0, "terms/clip_objective": _mean([step["clip_objective"] for step in steps])}
        for term in WEIGHTED:
            weights = [coefficient[term.coefficient] for coefficient in coefficients]
            if term.name in steps[0]:
                values = [step[term.name] for step in steps]
                line[f"terms/{term.name}"] = _mean(values)
                line[f"coef/{term.coefficient}"] = _weighted_coefficient(weights, values)
            elif not term.optional:
                line[f"coef/{term.coefficient}"] = _mean(weights)
        # In double precision from the terms, so that the line holds for a loss of any size.
        line["loss"] = -line["terms/clip_objective"] + sum(
            term.sign * line[f"coef/{term.coefficient}"] * line[f"terms/{term.name}"]
            for term in WEIGHTED
            if f"terms/{term.name}" in line
        )
        line |= {key: _mean([step[name] for step in steps]) for name, key in STATISTICS.items()}
        for name in dict.fromkeys(name for step in steps for name in step if name.startswith("grad_norm/")):
            line[name] = _mean([step[name] for step in steps if name in step])
        line["policy/ratio_max"] = max(step["ratio_max"] for step in steps)
        return line


# Metrics of a rollout that GRPO sets to 0 if there was nothing to measure, with the key and value that tell.
_MEASURED_UNLESS = {
    "completions/mean_terminated_length": ("completions/clipped_ratio", 1.0),
    "completions/min_terminated_length": ("completions/clipped_ratio", 1.0),
    "completions/max_terminated_length": ("completions/clipped_ratio", 1.0),
    "tools/failure_frequency": ("tools/call_frequency", 0.0),
}
_OF_SAMPLING_LOGPS = ("sampling/sampling_logp_difference", "sampling/importance_sampling_ratio")


def mark_unmeasured(metrics: dict[str, list[float]], has_sampling_logps: bool) -> None:
    """
    Replace 0 by NaN in GRPO's metrics of the last rollout if nothing was measured; GRPO's means leave NaN out.

    `has_sampling_logps`: vLLM gave the log-probability of some token that counts.
    """
    for name, (other, value) in _MEASURED_UNLESS.items():
        if name in metrics and metrics[other][-1] == value:
            metrics[name][-1] = math.nan
    for name in metrics:
        if name.startswith(_OF_SAMPLING_LOGPS) and not has_sampling_logps:
            metrics[name][-1] = math.nan


def drop_unmeasured(metrics: dict[str, list[float]]) -> None:
    """Remove the keys of the next log line that have no value but NaN."""
    for name in [name for name, values in metrics.items() if all(math.isnan(value) for value in values)]:
        del metrics[name]


def _weighted_coefficient(weights: list[float], values: list[float]) -> float:
    """Return mean(coef · x) / mean(x), so that the product with the window's mean(x) is exact."""
    total = sum(values)
    return sum(w * x for w, x in zip(weights, values, strict=True)) / total if total else _mean(weights)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def scores_by_prompt(scores: Tensor, num_generations: int) -> dict[str, Tensor]:
    """
    Return of each prompt the best score, `best_of_n`, and the standard deviation of its scores, `std_within_prompt`,
    with Bessel's correction; (G,) each, NaN where there are too few.

    Args:
        scores (G · n,): the scores of `num_generations` responses to each prompt, one after the other, NaN where no
            reward applies.
    """
    by_prompt = scores.view(-1, num_generations)
    known = ~by_prompt.isnan()
    count = known.sum(1)
    best = by_prompt.masked_fill(~known, -torch.inf).amax(1)
    squares = (by_prompt - by_prompt.nanmean(1, keepdim=True)).nan_to_num().square().sum(1)
    return {
        "best_of_n": best.masked_fill(count == 0, torch.nan),
        "std_within_prompt": (squares / (count - 1)).sqrt().masked_fill(count < 2, torch.nan),
    }


def held_out_score(scores: Tensor, first: Tensor | None = None) -> dict[str, float]:
    """
    Return the mean score of an evaluation and its rise since the first one, each with the half-width of its 95%
    interval, 1.96 · std / √n. The rise is paired: the mean difference of each prompt's score to its first.

    Args:
        scores (N,): a score for every held-out prompt, NaN where no reward applies; the mean of several responses.
        first (N,): the scores of the run's first evaluation; `None`, or of another length, for no comparison.

    Returns:
        `score`, `score_ci95`, `rise`, `rise_ci95`; what was not measured is left out.
    """
    columns = {"score": scores}
    if first is not None and len(first) == len(scores):
        columns["rise"] = scores - first
    line = {}
    for name, column in columns.items():
        known = column[~column.isnan()]
        if len(known):
            line[name] = known.mean().item()
        if len(known) > 1:
            line[f"{name}_ci95"] = half_width(known)
    return line


def means_of_batches(batches: list[dict[str, float]], sizes: list[int]) -> dict[str, float]:
    """
    Return the mean over all responses of metrics that GRPO gives per batch: calls of tools, and what reward functions
    log by `log_metric`. The frequency of failures is a mean over the calls.

    `sizes` are the responses in each batch, the same on every rank.
    """
    line = {}
    for name in dict.fromkeys(name for batch in batches for name in batch):
        known = [(b, size) for b, size in zip(batches, sizes, strict=True) if not math.isnan(b.get(name, math.nan))]
        weights = [size * (b["tools/call_frequency"] if name == "tools/failure_frequency" else 1) for b, size in known]
        if sum(weights) > 0:
            line[name] = sum(b[name] * w for (b, _), w in zip(known, weights, strict=True)) / sum(weights)
    return line


def held_out_responses(columns: dict[str, Tensor]) -> dict[str, float]:
    """
    Return GRPO's metrics of a batch of responses, over all held-out ones. GRPO's own mean over batches would count a
    smaller last batch as a whole one, and a mean of shortest lengths is no shortest length.

    Args:
        columns: (N,) of every response: `length`, tokens that the model wrote; `ended`, 1 if it ended by itself, else
            0; `rewards/<source>`, NaN where the source does not apply; `sampling/<what>/sum`, `count`, `min` and
            `max` over the tokens of each.

    Returns:
        Values by log key; what was not measured is left out.
    """
    lengths, ended = columns["length"], columns["ended"].bool()
    line = {"completions/clipped_ratio": (~ended).float().mean().item()}
    for name, known in (("length", lengths), ("terminated_length", lengths[ended])):
        if len(known):
            statistics = {"mean": known.mean(), "min": known.min(), "max": known.max()}
            line |= {f"completions/{statistic}_{name}": value.item() for statistic, value in statistics.items()}
    for name in [name for name in columns if name.startswith("rewards/")]:
        known = columns[name][~columns[name].isnan()]
        if len(known):
            line[f"{name}/mean"] = known.mean().item()
        if len(known) > 1:
            line[f"{name}/std"] = known.std().item()
    for name in [name.removesuffix("/sum") for name in columns if name.endswith("/sum")]:
        sums, count, low, high = (columns[f"{name}/{each}"] for each in ("sum", "count", "min", "max"))
        if count.any():
            line |= {f"{name}/mean": (sums.sum() / count.sum()).item(), f"{name}/max": high.max().item()}
            if name == "sampling/importance_sampling_ratio":  # as GRPO has it
                line[f"{name}/min"] = low.min().item()
    return line
