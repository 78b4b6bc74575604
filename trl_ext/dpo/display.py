"""What an evaluation shows people: completions of actor and reference, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.json_values import plain_line


FOLDER = "completions"


def show_completions(prompts: Sequence[str], actor: Sequence[str], reference: Sequence[str], label: str) -> None:
    """A table on the terminal."""
    table = Table(title=f"{label}: held-out prompts, actor and reference", show_lines=True)
    for column in ("prompt", "actor", "reference"):
        table.add_column(column, overflow="fold")
    for row in zip(prompts, actor, reference, strict=True):
        table.add_row(*(Text(text) for text in row))
    Console().print(table)


def write_completions(
    output_dir: str, prompts: Sequence[str], actor: Sequence[str], reference: Sequence[str], label: str
) -> Path:
    """The same as JSON lines, in `<output_dir>/completions/<label>.jsonl`."""
    path = Path(output_dir) / FOLDER / f"{label.replace('/', '_')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = [
        {"prompt": p, "actor": a, "reference": r} for p, a, r in zip(prompts, actor, reference, strict=True)
    ]
    path.write_text("".join(map(plain_line, rows)), encoding="utf-8")
    return path
