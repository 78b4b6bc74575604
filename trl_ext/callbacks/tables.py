"""What the callbacks share that ask the model something: a quiet model, a table on the terminal, and in a file."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.integrations import is_deepspeed_zero3_enabled


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = modes.get(name, module.training)


def takes_part(args: Any, state: Any) -> bool:
    """Whether this process computes: all do where the weights are spread over them, else the main process alone."""
    return state.is_world_process_zero or is_deepspeed_zero3_enabled() or bool(args.fsdp)


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer, also of a processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def text_of(prompt: Any) -> str:
    """A prompt for people: a conversation as its messages' contents, one a line."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def table_path(output_dir: str, folder: str, step: int) -> Path:
    return Path(output_dir) / folder / f"step_{step:05d}.jsonl"


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows; none where there is no file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line] if path.is_file() else []


def show_table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """On the terminal: a column for each key, numbers with two decimals."""
    table = Table(title=title, show_lines=True)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:  # as Text: "[/INST]" is no markup
        table.add_row(*(Text(f"{cell:+.2f}" if isinstance(cell, float) else str(cell)) for cell in row.values()))
    Console().print(table)
