"""Tables of a run: sample completions before and after with their rewards, and the implicit rewards of pairs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .curves import is_tie


# Row of a preference table -> the metrics it shows, and their format.
PREFERENCE_ROWS = {
    "pairs": (("preference/pairs",), "{:.0f}"),
    "chosen is the likelier completion": (("preference/ranking_accuracy",), "{:.1%}"),
    "loss, nats": (("loss",), "{:.4f}"),
    "implicit reward of chosen, mean ± std": (("rewards/chosen", "rewards/chosen_std"), "{:+.3f} ± {:.3f}"),
    "implicit reward of rejected, mean ± std": (("rewards/rejected", "rewards/rejected_std"), "{:+.3f} ± {:.3f}"),
    "chosen with a reward below 0": (("rewards/chosen_below_zero",), "{:.1%}"),
    "rejected with a reward below 0": (("rewards/rejected_below_zero",), "{:.1%}"),
    "margin, mean": (("rewards/margins",), "{:+.3f}"),
    "margin, 10%, 50%, 90% of pairs": (
        ("rewards/margins_p10", "rewards/margins_p50", "rewards/margins_p90"),
        "{:+.3f}, {:+.3f}, {:+.3f}",
    ),
    "gradient weight, mean": (("preference/gradient_weight",), "{:.3f}"),
    "Bradley-Terry calibration error": (("preference/calibration_error",), "{:.3f}"),
    "½ (log π_θ − log π_ref)², near the reference its KL": (("kl/ref",), "{:.2f}"),
    "log π_θ − log π_ref of chosen, nats": (("logps/chosen_drift",), "{:+.2f}"),
    "log π_θ − log π_ref of rejected, nats": (("logps/rejected_drift",), "{:+.2f}"),
    "correlation of margin and length difference": (("preference/length_correlation",), "{:+.2f}"),
}
ACCURACY = "preference/accuracy"


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the completions of the model before and after training, and their scores."""

    prompt: str
    before: str
    after: str
    score_before: float
    score_after: float


def pair_samples(folder: str | Path, first_step: int, last_step: int) -> list[Sample]:
    """
    The prompts that were completed at both steps, from the `completions_*.parquet` files that TRL writes into
    `<output_dir>/completions` with `log_completions=True`.
    """
    files = [Path(folder) / f"completions_{step:05d}.parquet" for step in (first_step, last_step)]
    before, after = map(_completions, files)
    return [
        Sample(prompt, before[prompt][0], after[prompt][0], before[prompt][1], after[prompt][1])
        for prompt in before
        if prompt in after
    ]


def _completions(path: Path) -> dict[str, tuple[str, float]]:
    """Prompt -> completion and the sum of its rewards; of a prompt's several completions, the last."""
    from datasets import Dataset

    table = Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
    known = {"step", "prompt", "completion", "advantage"}
    return {
        _text(row["prompt"]): (
            _text(row["completion"]),
            sum(value for name, value in row.items() if name not in known and isinstance(value, float)),
        )
        for row in table
    }


def _text(value: Any) -> str:
    """Plain text as it is; a conversation as its last message."""
    return value if isinstance(value, str) else str(value[-1]["content"])


def print_samples(samples: Sequence[Sample], title: str = "Held-out prompts, before and after") -> None:
    """A rich table on the terminal."""
    table = Table(title=title, show_lines=True)
    for column, style in (("prompt", "bold"), ("before", ""), ("after", "")):
        table.add_column(column, style=style, overflow="fold")
        if column != "prompt":
            table.add_column("score", justify="right", no_wrap=True)
    for sample in samples:
        before, after = f"{sample.score_before:+.2f}", f"{sample.score_after:+.2f}"
        colour = "green" if sample.score_after > sample.score_before else "red"
        # Text in brackets would be read as markup, and models write brackets.
        texts = [text.replace("[", r"\[") for text in (sample.prompt, sample.before, sample.after)]
        table.add_row(texts[0], texts[1], before, texts[2], f"[{colour}]{after}[/{colour}]")
    Console().print(table)


def samples_markdown(samples: Sequence[Sample]) -> str:
    """The same table in Markdown."""
    rows = ["| prompt | before | score | after | score |", "|---|---|---:|---|---:|"]
    for s in samples:
        prompt, before, after = (_cell(text) for text in (s.prompt, s.before, s.after))
        rows.append(f"| {prompt} | {before} | {s.score_before:+.2f} | {after} | {s.score_after:+.2f} |")
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """One line, with nothing that a Markdown table or HTML would take for its own."""
    for special, escaped in {"&": "&amp;", "|": "\\|", "<": "&lt;", "\n": " ⏎ "}.items():
        text = text.replace(special, escaped)
    return text.strip()


def preference_table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """
    The implicit rewards of held-out pairs in Markdown. Before the first step the policy is the reference: all margins
    are 0, and what depends on their signs is left out.

    Args:
        columns: heading -> the metrics of an evaluation by `DPOTrainerX`, with or without `eval_` in front.
    """
    metrics = [{key.removeprefix("eval_"): value for key, value in column.items()} for column in columns.values()]
    metrics = [{k: v for k, v in m.items() if not (is_tie(m) and _is_of_signs(k))} for m in metrics]
    rows = [["held-out pairs", *columns]]
    rows.append(["preference accuracy (95% interval)", *map(accuracy_text, metrics)])
    rows += [["accuracy, " + _cell(source), *cells] for source, cells in _of_sources(metrics).items()]
    for name, (keys, form) in PREFERENCE_ROWS.items():
        values = [[column.get(key) for key in keys] for column in metrics]
        if any(None not in row for row in values):
            rows.append([name, *("" if None in row else form.format(*row) for row in values)])
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    lines.insert(1, "|---|" + "---:|" * len(columns) + "\n")
    return "".join(lines)


def _is_of_signs(key: str) -> bool:
    return key.startswith(f"{ACCURACY}/") or key.endswith(("calibration_error", "below_zero"))


def accuracy_text(metrics: Mapping[str, float]) -> str:
    """Preference accuracy with its 95% interval; "all ties" where policy and reference are equal."""
    metrics = {key.removeprefix("eval_"): value for key, value in metrics.items()}
    if is_tie(metrics):
        return "all ties"
    low, high = metrics[f"{ACCURACY}_low"], metrics[f"{ACCURACY}_high"]
    return f"{metrics[ACCURACY]:.1%} ({low:.1%} to {high:.1%})"


def _of_sources(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """Source of the pairs -> its accuracy in each column."""
    prefix = f"{ACCURACY}/"
    sources = sorted({key.removeprefix(prefix) for column in metrics for key in column if key.startswith(prefix)})
    known = {source: [column.get(prefix + source) for column in metrics] for source in sources}
    return {source: ["" if v is None else f"{v:.1%}" for v in values] for source, values in known.items()}
