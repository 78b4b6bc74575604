"""Make the table of the first and last values of runs, and say which of several did best."""

from collections.abc import Mapping, Sequence

from ..runs.log import Series, held_out_accuracy, memory, reference_kl, scores, series
from .run import Run
from .tables import preference_rows


def result_rows(run: Run) -> list[list[str]]:
    """Return name, value at the first and at the last evaluation; of training, at the first and the last line."""
    rows = []
    accuracy = held_out_accuracy(run.log)
    evaluations = [line for line in run.log if accuracy in line]
    if run.kind == "dpo" and evaluations and "eval_preference/accuracy_low" in evaluations[0]:
        rows = preference_rows([evaluations[0], evaluations[-1]])
    else:
        for label, points, form in (
            ("score on held-out prompts", series(run.log, "eval_reward/score"), "{:+z.3f}"),
            ("95% half-width of the score", series(run.log, "eval_reward/score_ci95"), "{:.3f}"),
            ("rise, paired by prompt", series(run.log, "eval_reward/rise"), "{:+z.3f}"),
            ("95% half-width of the rise", series(run.log, "eval_reward/rise_ci95"), "{:.3f}"),
            ("held-out KL, nats per sequence", series(run.log, "eval_kl/ref"), "{:z.2f}"),
            ("score in training", scores(run.log), "{:+z.3f}"),
            ("KL in training, nats per sequence", reference_kl(run.log), "{:z.2f}"),
            ("held-out accuracy", series(run.log, accuracy or ""), "{:.1%}"),
            ("held-out loss", series(run.log, "eval_loss"), "{:.4f}"),
            ("loss", series(run.log, "loss"), "{:.4f}"),
            ("tokens per response", series(run.log, "completions/mean_length"), "{:.1f}"),
            ("entropy, nats per token", series(run.log, "terms/entropy"), "{:.3f}"),
        ):
            rows += _first_and_last(label, points, form)
    rows += _first_and_last("tokens per second", series(run.log, "tokens_per_second"), "{:,.0f}")
    steps, peaks = memory(run.log)
    rows += _first_and_last("GiB at most held, of one process", (steps[-1:], [max(peaks)] if peaks else []), "{:.2f}")
    return rows + _first_and_last(
        "seconds of training, since it was last started", series(run.log, "train_runtime"), "{:.0f}"
    )


def side_by_side(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the rows of several runs: the name, and the first and the last value of each run, empty if unknown."""
    of_runs = [{name: (first, last) for name, first, last in result_rows(run)} for run in runs]
    names = rows_of(of_runs)
    alarms = [("", str(len(run.alarms))) for run in runs]
    return [("alarms", alarms), *((name, [of.get(name, ("", "")) for of in of_runs]) for name in names)]


def rows_of(columns: Sequence[Mapping[str, object]]) -> list[str]:
    """Return the names that any column has, in their order."""
    return list(dict.fromkeys(name for column in columns for name in column))


def goal(run: Run) -> tuple[str, float, float, float] | None:
    """Return what a run is chosen by, its last held-out value and the ends of its 95% interval; `None` without."""
    for key, width in (("eval_reward/score", "eval_reward/score_ci95"), ("eval_reward", "")):
        value = _last(run, key)
        if value is not None:
            half = _last(run, width) or 0.0
            return "held-out score", value, value - half, value + half
    accuracy = held_out_accuracy(run.log)
    value = _last(run, accuracy or "")
    if value is None:
        return None
    low, high = (_last(run, f"{accuracy}_{end}") for end in ("low", "high"))
    return "held-out accuracy", value, value if low is None else low, value if high is None else high


def choice(runs: Sequence[Run]) -> list[str]:
    """Return for each goal that several runs share, in a sentence, which is best, and which cannot be told from it."""
    goals: dict[str, list[tuple[Run, float, float, float]]] = {}
    for run in runs:
        found = goal(run)
        if found is not None:
            goals.setdefault(found[0], []).append((run, *found[1:]))
    sentences = []
    for name, reached in goals.items():
        if len(reached) < 2:
            continue
        form = "{:.1%}" if name == "held-out accuracy" else "{:+z.3f}"
        _, value, low, high = max(reached, key=lambda each: each[1])
        interval = f" (95%: {form.format(low)} to {form.format(high)})" if low < high else ""
        first = [run for run, its_value, _, _ in reached if its_value == value]
        names = ", ".join(run.name for run in first)
        text = f"Highest {name} in the last evaluation: {names}, {form.format(value)}{interval}."
        others = [each for each in reached if each[1] != value]
        close = [run.name for run, _, _, its_high in others if its_high >= low]
        if low < high and close:
            text += f" The intervals of {', '.join(close)} overlap with it: they are not told apart."
        elif low < high and others:
            text += " No other interval reaches it."
        sentences.append(text)
    return sentences


def _last(run: Run, key: str) -> float | None:
    values = series(run.log, key)[1]
    return values[-1] if values else None


def _first_and_last(label: str, points: Series, form: str) -> list[list[str]]:
    """Return a row of the first and the last value; a single value is the last; no row without a value."""
    values = points[1]
    if not values:
        return []
    return [[label, form.format(values[0]) if len(values) > 1 else "", form.format(values[-1])]]
