"""The panels of a policy that samples: PPO, GRPO, RLOO."""

from ..ppo.terms import TERMS
from ..runs.log import Log, Series, reference_kl, scores, series
from .chart import Band, Chart, Curve
from .drawing import OF_RUNS
from .machine_panels import IDLE_TIME, MEMORY, THROUGHPUT, TIME, stacked
from .panel import LEARNING, Panel, Runs, by_name, lines, spread
from .run import Run


def reward(runs: Runs) -> Chart:
    curves = []
    for run in runs:
        shade = run.colour or "blue"
        curves.append(Curve("rollouts", scores(run.log), shade, run.name))
        points = held_out_scores(run)
        widths = dict(zip(*series(run.log, "eval_reward/score_ci95"), strict=True))
        ends = [[v + sign * widths.get(s, 0.0) for s, v in zip(*points, strict=True)] for sign in (-1, 1)]
        label = "held-out prompts, 95% interval" if widths else "held-out prompts"
        curves.append(Curve(label, points, shade, run.name, "held out", *(ends if widths else ())))
    return Chart("score", curves)


def frontier(runs: Runs) -> Chart:
    """Show the score over the KL: a dot for each rollout, a diamond for each evaluation."""
    curves = []
    for run in runs:
        shade = run.colour or "blue"
        steps, points = _paired(reference_kl(run.log), scores(run.log))
        curves.append(Curve("rollouts, later ones stronger", points, shade, run.name, "dots", steps=steps))
        steps, points = _paired(series(run.log, "eval_kl/ref"), held_out_scores(run))
        curves.append(Curve("held-out prompts", points, shade, run.name, "held out", steps=steps))
    low, high = runs[0].kl_band
    band = Band(low, high, f"KL {low:g} to {high:g}", along_x=True)
    return Chart("score", curves, "KL to the reference, nats per sequence", band=band)


def kl(runs: Runs) -> Chart:
    curves = []
    for run in runs:
        shade = run.colour or "red"
        curves.append(Curve("rollouts", reference_kl(run.log), shade, run.name))
        curves.append(Curve("held-out prompts", series(run.log, "eval_kl/ref"), shade, run.name, "held out"))
    low, high = runs[0].kl_band
    return Chart("KL, nats per sequence", curves, band=Band(low, high, f"band {low:g} to {high:g}"))


def kl_coefficient(runs: Runs) -> Chart:
    curves = [Curve("", series(run.log, "coef/kl"), run.colour or "amber", run.name, "steps") for run in runs]
    return Chart("coefficient of the KL", curves, bottom=0)


def contributions(log: Log) -> dict[str, Series]:
    """Return steps and values of each weighted term of the PPO loss, which add up to `loss`; not those always 0."""
    curves = {}
    for term in TERMS:
        name, weight = f"terms/{term.name}", f"coef/{term.coefficient}"
        lines = [line for line in log if line.get(name) is not None]
        values = [term.sign * float(line[name]) for line in lines]
        if term.coefficient:
            weights = [line.get(weight) for line in lines]
            lines = [line for line, each in zip(lines, weights, strict=True) if each is not None]
            values = [value * float(each) for value, each in zip(values, weights, strict=True) if each is not None]
        if any(values):
            curves[term.contribution] = ([int(line["step"]) for line in lines], values)
    return curves


COLOURS_OF_TERMS = {term.contribution: OF_RUNS[i % len(OF_RUNS)] for i, term in enumerate(TERMS)}


def loss_terms(runs: Runs) -> Chart:
    """Stack the signed contributions of one run: those above 0 add to the loss, those below subtract."""
    (run,) = runs
    curves = stacked(contributions(run.log), COLOURS_OF_TERMS, run.name)
    total = Curve("loss, their sum", series(run.log, "loss"), "ink", run.name, smooth=False)
    return Chart("adds to the loss", [*curves, total], level=(0.0, ""))


def policy_terms(runs: Runs) -> Chart:
    """Show the same without the value loss, which dwarfs them: what the actor learns from."""
    (run,) = runs
    critic = next(term.contribution for term in TERMS if term.name == "value_loss")
    shown = {term: points for term, points in contributions(run.log).items() if term != critic}
    curves = [Curve(term, points, COLOURS_OF_TERMS[term], run.name) for term, points in shown.items()]
    return Chart("adds to the loss, without the critic", curves, level=(0.0, ""))


def held_out_scores(run: Run) -> Series:
    """Return the scores of evaluations, of PPO, GRPO or RLOO."""
    points = series(run.log, "eval_reward/score")
    return points if points[1] else series(run.log, "eval_reward")


def _paired(first: Series, second: Series) -> tuple[list[int], tuple[list[float], list[float]]]:
    """Return the steps that two series share, and the values of both there."""
    known = dict(zip(*second, strict=True))
    shared = [(step, value, known[step]) for step, value in zip(*first, strict=True) if step in known]
    return [step for step, _, _ in shared], ([x for _, x, _ in shared], [y for _, _, y in shared])


POLICY = (
    Panel(
        "Reward",
        (reward,),
        ("reward/score", "reward"),
        "Healthy: rising, then flat. Where the held-out score stops and the training goes on rising, stop.",
    ),
    Panel(
        "Reward against KL",
        (frontier,),
        ("kl/ref", "kl"),
        "Healthy: upwards within the band. It shows what the reward has cost: right is further from the reference.",
    ),
    Panel(
        "KL to the reference and its coefficient",
        (kl, kl_coefficient),
        ("kl/ref", "kl"),
        "Healthy: 0 at first, then within the band. A controller that keeps raising the coefficient cannot hold the "
        "KL.",
    ),
    Panel(
        "What each term adds to the loss",
        (loss_terms, policy_terms),
        ("terms/clip_objective",),
        "Healthy: no term of the actor dwarfs the others. Weighted and signed, the terms add up to the loss; the clip "
        "objective starts near 0 in every rollout.",
        per_run=True,
    ),
    Panel(
        "Lengths of responses",
        (
            spread(
                ("completions/mean_length",),
                ("completions/min_length", "completions/max_length"),
                "tokens per response",
                "shortest to longest",
                bottom=0,
            ),
        ),
        ("completions/mean_length",),
        "Healthy: steady. A drift to the limit or to a few tokens says that length is rewarded.",
    ),
    Panel(
        "Responses cut off",
        (lines(("completions/clipped_ratio", "training"), ylabel="share without an end token"),),
        ("completions/clipped_ratio",),
        "Healthy: falling. Near 1, allow longer responses, or penalise a missing end.",
    ),
    Panel(
        "Entropy",
        (lines(("terms/entropy", ""), ("entropy", ""), ylabel="nats per token", evaluations=False),),
        ("terms/entropy", "entropy"),
        "Healthy: falling slowly. A fall to a tenth within a few rollouts is collapse.",
    ),
    Panel(
        "Clipping, and how far an update goes",
        (
            lines(
                ("policy/clip_fraction", "policy"),
                ("value/clip_fraction", "value"),
                ("clip_ratio/region_mean", "policy"),
                ylabel="share of tokens clipped",
                evaluations=False,
            ),
            lines(("policy/approx_kl", ""), ylabel="KL of the update, nats per token", evaluations=False),
        ),
        ("policy/clip_fraction", "clip_ratio/region_mean"),
        "Healthy: 0 in the first step of a rollout, 0.02 to 0.2 later. Above 0.3, lower the learning rate or the "
        "epochs.",
    ),
    Panel(
        "Explained variance of the critic",
        (
            lines(
                ("value/explained_variance", "the critic"),
                ylabel="1 − Var(R − V) / Var(R)",
                evaluations=False,
                level=(0.0, "a constant"),
            ),
        ),
        ("value/explained_variance",),
        "Healthy: from about 0 up to 0.3 to 0.9. Below 0 for long, the critic is worse than a constant.",
    ),
    Panel(
        "Rewards by source",
        (by_name("rewards/", "mean of the source", "/mean"),),
        ("rewards/",),
        "Healthy: rising, or at least not falling while another rises.",
        per_run=True,
        at_least=4,  # the mean and the std of two sources
    ),
    TIME,
    IDLE_TIME,
    THROUGHPUT,
    MEMORY,
    LEARNING,
)
