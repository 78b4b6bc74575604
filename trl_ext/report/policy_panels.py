"""Draw the panels of a policy that samples: PPO, GRPO, RLOO."""

import math
from typing import Any

from ..ppo.terms import TERMS
from ..runs.log import Log, Series, reference_kl, scores, series
from .drawing import COLOURS, OF_RUNS, curve, finish, held_out, level, thin
from .machine_panels import MEMORY, THROUGHPUT, TIME
from .panel import LEARNING, Panel, Runs, by_name, colour, lines, name, spread, two_rows
from .run import Run


def reward(figure: Any, runs: Runs) -> None:
    axis = figure.subplots()
    for run in runs:
        curve(axis, scores(run.log), colour(runs, run), name(runs, run, "rollouts"))
        evaluations = _held_out_scores(run)
        widths = dict(zip(*series(run.log, "eval_reward/score_ci95"), strict=True))
        low, high = (
            (evaluations[0], [v + sign * widths.get(s, 0.0) for s, v in zip(*evaluations, strict=True)])
            for sign in (-1, 1)
        )
        label = "held-out prompts, 95% interval" if widths else "held-out prompts"
        held_out(axis, evaluations, colour(runs, run), name(runs, run, label), (low, high))
    finish(axis, "score")


def frontier(figure: Any, runs: Runs) -> None:
    """Draw the score over the KL: a point for each rollout, later ones stronger; diamonds for evaluations."""
    axis = figure.subplots()
    for run in runs:
        shade = COLOURS[colour(runs, run)]
        points = _paired(thin(reference_kl(run.log)), scores(run.log))
        for i, (kl, score) in enumerate(points):
            axis.plot([kl], [score], ".", color=shade, alpha=0.25 + 0.75 * (i + 1) / len(points), markersize=7)
        evaluations = _paired(series(run.log, "eval_kl/ref"), _held_out_scores(run))
        if evaluations:
            style = {"markeredgecolor": COLOURS["ink"], "markersize": 6, "label": name(runs, run, "held-out prompts")}
            axis.plot(*zip(*evaluations, strict=True), "D:", color=shade, **style)
    low, high = runs[0].kl_band
    axis.axvspan(low, high, color=COLOURS["band"], zorder=0, linewidth=0, label=f"KL {low:g} to {high:g}")
    finish(axis, "score", "KL to the reference, nats per sequence")


def kl(figure: Any, runs: Runs) -> None:
    axis = figure.subplots()
    low, high = runs[0].kl_band
    axis.axhspan(low, high, color=COLOURS["band"], zorder=0, linewidth=0, label=f"band {low:g} to {high:g}")
    for run in runs:
        curve(axis, reference_kl(run.log), colour(runs, run, "red"), name(runs, run, "rollouts"))
        held_out(axis, series(run.log, "eval_kl/ref"), colour(runs, run, "red"), name(runs, run, "held-out prompts"))
    finish(axis, "nats per sequence")


def kl_coefficient(figure: Any, runs: Runs) -> None:
    axis = figure.subplots()
    for run in runs:
        steps, values = thin(series(run.log, "coef/kl"))
        shade = COLOURS[colour(runs, run, "amber")]
        axis.plot(steps, values, color=shade, drawstyle="steps-post", label=name(runs, run, "kl_coef"))
    axis.set_ylim(bottom=0)
    finish(axis, "coefficient")


def contributions(log: Log) -> dict[str, Series]:
    """Return steps and values of each weighted term of the PPO loss, which add up to `loss`; not those always 0."""
    curves = {}
    for term in TERMS:
        keys = [f"terms/{term.name}", *([f"coef/{term.coefficient}"] if term.coefficient else [])]
        lines = [line for line in log if all(line.get(key) is not None for key in keys)]
        values = [term.sign * math.prod(float(line[key]) for key in keys) for line in lines]
        if any(values):
            curves[term.contribution] = ([int(line["step"]) for line in lines], values)
    return curves


def loss_terms(figure: Any, runs: Runs) -> None:
    """Stack the signed contributions of one run: those above 0 add to the loss, those below subtract."""
    (run,) = runs
    axis = figure.subplots()
    curves = {term: thin(points) for term, points in contributions(run.log).items()}
    for sign in (1, -1):
        floor: list[float] = []
        for i, term in enumerate(term.contribution for term in TERMS):
            if term not in curves:
                continue
            steps, values = curves[term]
            floor = floor or [0.0] * len(values)
            top = [base + sign * max(0.0, sign * value) for base, value in zip(floor, values, strict=True)]
            style = {"color": COLOURS[OF_RUNS[i % len(OF_RUNS)]], "alpha": 0.55, "linewidth": 0}
            axis.fill_between(steps, floor, top, label=term if sign == 1 else "", **style)
            floor = top
    axis.plot(*thin(series(run.log, "loss")), color=COLOURS["ink"], label="loss, their sum")
    axis.axhline(0, color=COLOURS["muted"], linewidth=0.8)
    finish(axis, "adds to the loss")


def policy_terms(figure: Any, runs: Runs) -> None:
    """Draw the same without the value loss, which dwarfs them: what the actor learns from."""
    (run,) = runs
    axis = figure.subplots()
    curves = contributions(run.log)
    for i, term in enumerate(TERMS):
        if term.name != "value_loss" and term.contribution in curves:
            curve(axis, curves[term.contribution], OF_RUNS[i % len(OF_RUNS)])
    level(axis, 0)
    finish(axis, "those of the actor")


def _held_out_scores(run: Run) -> Series:
    points = series(run.log, "eval_reward/score")
    return points if points[1] else series(run.log, "eval_reward")


def _paired(first: Series, second: Series) -> list[tuple[float, float]]:
    """Return the values of two series at the steps that both have."""
    known = dict(zip(*second, strict=True))
    return [(value, known[step]) for step, value in zip(*first, strict=True) if step in known]


POLICY = (
    Panel(
        "Reward",
        reward,
        ("reward/score", "reward"),
        "Rising, then flat. When the held-out score stops and the training goes on rising, stop.",
    ),
    Panel(
        "Reward against KL",
        frontier,
        ("kl/ref", "kl"),
        "What the reward has cost: right is further from the reference. Later rollouts are stronger in colour.",
    ),
    Panel(
        "KL to the reference and its coefficient",
        two_rows(kl, kl_coefficient),
        ("kl/ref", "kl"),
        "0 at first, then within the band. A controller that keeps raising the coefficient cannot hold the KL.",
        height=5.6,
    ),
    Panel(
        "What each term adds to the loss",
        two_rows(loss_terms, policy_terms),
        ("terms/clip_objective",),
        "Weighted and signed, the terms add up to the loss; below, those of the actor alone. The clip objective "
        "starts near 0 in every rollout.",
        height=5.6,
        per_run=True,
    ),
    Panel(
        "Lengths of responses",
        spread(
            ("completions/mean_length",),
            ("completions/min_length", "completions/max_length"),
            "tokens per response",
            "shortest to longest",
        ),
        ("completions/mean_length",),
        "Steady. A drift to the limit or to a few tokens says that length is rewarded.",
    ),
    Panel(
        "Responses cut off",
        lines(("completions/clipped_ratio", "training"), ylabel="share without an end token"),
        ("completions/clipped_ratio",),
        "Falling. Near 1: allow longer responses, or penalise a missing end.",
    ),
    Panel(
        "Entropy",
        lines(("terms/entropy", ""), ("entropy", ""), ylabel="nats per token", evaluations=False),
        ("terms/entropy", "entropy"),
        "Falls slowly. A fall to a tenth within a few rollouts is collapse.",
    ),
    Panel(
        "Clipping, and how far an update goes",
        two_rows(
            lines(
                ("policy/clip_fraction", "policy"),
                ("value/clip_fraction", "value"),
                ("clip_ratio/region_mean", "policy"),
                ylabel="share of tokens clipped",
                evaluations=False,
            ),
            lines(("policy/approx_kl", ""), ylabel="KL of the update, nats", evaluations=False),
        ),
        ("policy/clip_fraction", "clip_ratio/region_mean"),
        "0 in the first step of a rollout, 0.02 to 0.2 later; above 0.3 lower the learning rate or the epochs.",
        height=5.2,
    ),
    Panel(
        "Explained variance of the critic",
        lines(("value/explained_variance", ""), ylabel="1 − Var(R − V) / Var(R)", evaluations=False, at=0),
        ("value/explained_variance",),
        "From about 0 up to 0.3 to 0.9. Below 0 for long: the critic is worse than a constant.",
    ),
    Panel(
        "Rewards by source",
        by_name("rewards/", "mean of the source", "/mean"),
        ("rewards/",),
        "Rising, or at least not falling while another rises.",
        per_run=True,
        at_least=4,  # the mean and the std of two sources
    ),
    TIME,
    THROUGHPUT,
    MEMORY,
    LEARNING,
)
