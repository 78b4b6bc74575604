"""What an evaluation shows people: completions of actor and reference, side by side."""

from collections.abc import Sequence
from pathlib import Path

from ..runs.tables import show_table, write_rows


COLUMNS = ("prompt", "actor", "reference")


def show_completions(prompts: Sequence[str], actor: Sequence[str], reference: Sequence[str], label: str) -> None:
    """Print a table on the terminal."""
    rows = zip(prompts, actor, reference, strict=True)
    show_table(f"{label}: held-out prompts, actor and reference", COLUMNS, rows)


def write_completions(
    output_dir: str, prompts: Sequence[str], actor: Sequence[str], reference: Sequence[str], label: str
) -> None:
    """Write the same as JSON lines into `<output_dir>/completions/<label>.jsonl`."""
    path = Path(output_dir) / "completions" / f"{label.replace('/', '_')}.jsonl"
    write_rows(path, [dict(zip(COLUMNS, row, strict=True)) for row in zip(prompts, actor, reference, strict=True)])
