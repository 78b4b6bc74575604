"""Tables of a run: on the terminal, and as files of JSON lines."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.json_values import plain_line
from .folder import write_whole


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: 1 step, 2 steps, 2 passes, 2 mini-batches."""
    ending = "" if number == 1 else "es" if noun.endswith(("s", "batch")) else "s"
    return f"{number} {noun}{ending}"


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], file: Path | None = None) -> None:
    """Print a table, also into a file. A cell is a number, shown with two decimals, a text, or rich's `Text`."""
    table = Table(title=title, show_lines=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:  # as Text: "[/INST]" is no markup
        shown = [f"{cell:+z.2f}" if isinstance(cell, float) else cell for cell in row]
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in shown))
    console = Console(record=file is not None)
    console.print(table)
    if file is not None:
        console.save_text(str(file))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(map(plain_line, rows))
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
