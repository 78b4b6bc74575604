"""Tables of a run: sample completions before and after with their rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


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
