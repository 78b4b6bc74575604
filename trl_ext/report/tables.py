"""Read and show sample completions before and after with their rewards, and the implicit rewards of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from ..runs.folder import is_of_this_run, newest
from ..runs.log import is_tie
from ..runs.tables import read_rows, show_table


# Row of a preference table -> the metrics it shows, and their format.
PREFERENCE_ROWS = {
    "pairs": (("preference/pairs",), "{:.0f}"),
    "chosen is the likelier completion": (("preference/ranking_accuracy",), "{:.1%}"),
    "loss, nats": (("loss",), "{:.4f}"),
    "implicit reward of chosen, mean ± std": (("rewards/chosen", "rewards/chosen_std"), "{:+z.3f} ± {:.3f}"),
    "implicit reward of rejected, mean ± std": (("rewards/rejected", "rewards/rejected_std"), "{:+z.3f} ± {:.3f}"),
    "chosen with a reward below 0": (("rewards/chosen_below_zero",), "{:.1%}"),
    "rejected with a reward below 0": (("rewards/rejected_below_zero",), "{:.1%}"),
    "margin, mean": (("rewards/margins",), "{:+z.3f}"),
    "margin, 10%, 50%, 90% of pairs": (
        ("rewards/margins_p10", "rewards/margins_p50", "rewards/margins_p90"),
        "{:+z.3f}, {:+z.3f}, {:+z.3f}",
    ),
    "gradient weight, mean": (("preference/gradient_weight",), "{:.3f}"),
    "Bradley-Terry calibration error": (("preference/calibration_error",), "{:.3f}"),
    "½ (log π_θ − log π_ref)², near the reference its KL": (("kl/ref",), "{:z.2f}"),
    "log π_θ − log π_ref of chosen, nats": (("logps/chosen_drift",), "{:+z.2f}"),
    "log π_θ − log π_ref of rejected, nats": (("logps/rejected_drift",), "{:+z.2f}"),
    "correlation of margin and length difference": (("preference/length_correlation",), "{:+z.2f}"),
}
ACCURACY = "preference/accuracy"


SHOWN = 12  # rows of a table on the page


@dataclass(frozen=True)
class Sample:
    """A prompt with the completions of the model before and after training; their scores, where there are any."""

    prompt: str
    before: str
    after: str
    score_before: float | None = None
    score_after: float | None = None


@dataclass(frozen=True)
class Pair:
    """A pair of completions with its implicit rewards, in β · nats, as first and as last written down."""

    prompt: str
    chosen: str
    rejected: str
    rewards_before: tuple[float, float]
    rewards_after: tuple[float, float]


def read_samples(folder: str | Path, log: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """
    Return completions before and after, from the files of `SampleCallback` (`samples/`), of DPOTrainerX with
    `generate_during_eval` (`completions/*.jsonl`), or of TRL with `log_completions` (`completions/*.parquet`) if the
    first and the last evaluation answered the same prompts. Files of an earlier run in the folder are skipped.
    """
    folder = Path(folder)
    for files in (_files(folder, "samples/*.jsonl"), _files(folder, "completions/*.jsonl")):
        if files:
            return [Sample(row["prompt"], row["reference"], row["actor"]) for row in read_rows(files[0])][:SHOWN]
    if not any((folder / "completions").glob("*.parquet")):
        return []
    steps = [int(line["step"]) for line in log if any(key.startswith("eval_") for key in line)]
    tables = [_table(folder / "completions", step) for step in steps]
    steps = [step for step, path in zip(steps, tables, strict=True) if is_of_this_run(path, folder)]
    if len(set(steps)) < 2:
        return []
    return pair_samples(folder / "completions", steps[0], steps[-1])[:SHOWN]


def read_pairs(folder: str | Path) -> list[Pair]:
    """Return the pairs that `ImplicitRewardCallback` wrote first and last."""
    files = _files(Path(folder), "implicit_rewards/step_*.jsonl")
    if not files:
        return []
    first, last = read_rows(min(files)), read_rows(files[0])
    return [
        Pair(
            prompt=after["prompt"],
            chosen=after["chosen"],
            rejected=after["rejected"],
            rewards_before=(before["chosen_reward"], before["rejected_reward"]),
            rewards_after=(after["chosen_reward"], after["rejected_reward"]),
        )
        for before, after in zip(first, last, strict=False)
    ][:SHOWN]


def _files(folder: Path, pattern: str) -> list[Path]:
    """Return the tables of the last run in a folder, the newest first."""
    return newest([path for path in folder.glob(pattern) if is_of_this_run(path, folder)])


def _table(folder: Path, step: int) -> Path:
    return folder / f"completions_{step:05d}.parquet"


def pair_samples(folder: str | Path, first_step: int, last_step: int) -> list[Sample]:
    """Return the prompts completed at both steps, from TRL's parquet files (`log_completions=True`)."""
    paths = [_table(Path(folder), step) for step in (first_step, last_step)]
    if not all(path.is_file() for path in paths):  # a run that was resumed into another folder
        return []
    before, after = map(_completions, paths)
    return [
        Sample(prompt, before[prompt][0], after[prompt][0], before[prompt][1], after[prompt][1])
        for prompt in before
        if prompt in after
    ]


def _completions(path: Path) -> dict[str, tuple[str, float]]:
    """Return completion and sum of rewards by prompt; of several completions, the last."""
    from pyarrow import parquet

    table = parquet.read_table(path).to_pylist()
    known = {"step", "prompt", "completion", "advantage"}
    return {
        _text(row["prompt"]): (
            _text(row["completion"]),
            sum(value for name, value in row.items() if name not in known and isinstance(value, float)),
        )
        for row in table
    }


def _text(value: Any) -> str:
    """Return plain text as it is, and a conversation as its last message."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def print_samples(samples: Sequence[Sample], title: str = "Held-out prompts, before and after") -> None:
    """Print samples with their scores on the terminal, a score that rose in green."""
    rows = []
    for sample in samples:
        colour = "green" if (sample.score_after or 0) > (sample.score_before or 0) else "red"
        scores = Text(score_text(sample.score_before)), Text(score_text(sample.score_after), style=colour)
        after = "(the same)" if sample.after == sample.before else sample.after
        rows.append([Text(sample.prompt, style="bold"), sample.before, scores[0], after, scores[1]])
    show_table(title, ("prompt", "before", "score", "after", "score"), rows)


def samples_markdown(samples: Sequence[Sample]) -> str:
    """Return the same table in Markdown."""
    rows = ["| prompt | before | score | after | score |", "|---|---|---:|---|---:|"]
    for s in samples:
        prompt, before, after = (_cell(text) for text in (s.prompt, s.before, s.after))
        rows.append(f"| {prompt} | {before} | {score_text(s.score_before)} | {after} | {score_text(s.score_after)} |")
    return "\n".join(rows) + "\n"


def score_text(score: float | None) -> str:
    return "" if score is None else f"{score:+z.2f}"


def _cell(text: str) -> str:
    """Return a text in one line, with the special characters of Markdown tables and HTML escaped."""
    for special, escaped in {"&": "&amp;", "|": "\\|", "<": "&lt;", "\n": " ⏎ "}.items():
        text = text.replace(special, escaped)
    return text.strip()


def preference_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """
    Return the implicit rewards of held-out pairs in Markdown, a column for each evaluation by `DPOTrainerX`, with or
    without `eval_` in front. Before the first step the policy is the reference: all margins are 0, and what depends on
    their signs is left out.
    """
    rows = [["held-out pairs", *columns], *preference_rows(list(columns.values()))]
    lines = [f"| {' | '.join([_cell(row[0]), *row[1:]])} |\n" for row in rows]
    lines.insert(1, "|---|" + "---:|" * len(columns) + "\n")
    return "".join(lines)


def preference_rows(columns: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Return the same as rows of cells: the name of each, and its value in each column."""
    metrics = [{key.removeprefix("eval_"): value for key, value in column.items()} for column in columns]
    for i, column in enumerate(metrics):
        if is_tie(column):  # nothing that depends on signs
            ends = ("calibration_error", "below_zero")
            metrics[i] = {k: v for k, v in column.items() if not (k.startswith(f"{ACCURACY}/") or k.endswith(ends))}
    rows = [["preference accuracy (95% interval)", *map(accuracy_text, metrics)]]
    for key in sorted({key for column in metrics for key in column if key.startswith(f"{ACCURACY}/")}):
        cells = ["" if column.get(key) is None else f"{column[key]:.1%}" for column in metrics]
        rows.append(["accuracy, " + key.removeprefix(f"{ACCURACY}/"), *cells])
    for name, (keys, form) in PREFERENCE_ROWS.items():
        values = [[column.get(key) for key in keys] for column in metrics]
        if any(None not in row for row in values):
            rows.append([name, *("" if None in row else form.format(*row) for row in values)])
    return rows


def accuracy_text(metrics: Mapping[str, float]) -> str:
    """Return the preference accuracy with its 95% interval; "all ties" if policy and reference are equal."""
    metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    if is_tie(metrics):
        return "all ties"
    if f"{ACCURACY}_low" not in metrics:  # TRL's own trainer: a mean over batches
        return f"{metrics['rewards/accuracies']:.1%}"
    low, high = metrics[f"{ACCURACY}_low"], metrics[f"{ACCURACY}_high"]
    return f"{metrics[ACCURACY]:.1%} ({low:.1%} to {high:.1%})"


def first_and_last_evaluation(trainer: Any, key: str) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the lines with `key` from before the first step, if any, and from after the last; evaluate if need be."""

    def held_out() -> list[dict[str, Any]]:
        return [line for line in trainer.state.log_history if key in line]

    if not held_out() or held_out()[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    if not held_out():
        raise ValueError(
            f"The evaluation after the last step gave no {key}: no source of the reward applied to a held-out answer. "
            "See that a reward function returns a number for some of them."
        )
    first, last = held_out()[0], held_out()[-1]
    return (first if first["step"] == 0 and first is not last else None), last
