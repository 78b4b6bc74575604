"""Compare a model's answers with its reference's, in tables on the terminal and in files, for several callbacks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from ..models.sharding import is_fsdp
from ..runs.failures import in_spite_of_errors
from ..runs.tables import read_rows, show_table, write_rows


Row = dict[str, Any]


class ModelTable:
    """
    The answers of a model and its reference to the same questions, at the start of a run and whenever `again` is
    called: on the terminal, and in `<folder>/step_<step>.jsonl` in the run's folder. The reference is the model as it
    is when training starts, unless another is given; it is asked once, and a resumed run reads its answers from the
    first table.

    Args:
        shown: the columns of the table on the terminal, under `title`.
        ask: from a model and its processing class to the answers.
        rows: from the training arguments, the model's answers and the reference's to the rows.
        recall: from the rows of a run's first table to the reference's answers, `None` if they are to other questions.
        reference: another model to compare with.
    """

    def __init__(
        self,
        folder: str,
        title: str,
        shown: Sequence[str],
        ask: Callable[[Any, Any], Any],
        rows: Callable[[Any, Any, Any], list[Row]],
        recall: Callable[[list[Row]], Any],
        reference: Any = None,
    ):
        self.folder, self.title, self.shown = folder, title, shown
        self.ask, self.rows, self.recall = ask, rows, recall
        self.reference = reference
        self._of_reference: Any = None
        self._shown_at = -1

    def begin(self, args: Any, state: Any, model: Any = None, processing_class: Any = None, **kwargs: Any) -> None:
        """Ask the reference when training starts; write the first table, which is not shown."""
        if not takes_part(args, state):
            return
        first = read_rows(table_path(args.output_dir, self.folder, 0)) if state.global_step else []
        known = self.recall(first) if first else None
        self._of_reference = self.ask(self.reference or model, processing_class) if known is None else known
        if state.global_step == 0:
            is_reference = self.reference is None
            self._write(args, state, self._of_reference if is_reference else self.ask(model, processing_class))

    def again(self, args: Any, state: Any, model: Any = None, processing_class: Any = None, **kwargs: Any) -> bool:
        """Write and show the table of this step, unless it has one; return whether it was shown here and now."""
        if not takes_part(args, state) or self._shown_at == state.global_step:
            return False
        rows = self._write(args, state, self.ask(model, processing_class))
        if rows:
            columns = [name.replace("_", " ") for name in self.shown]
            cells = [[row[name] for name in self.shown] for row in rows]
            show_table(f"Step {state.global_step}: {self.title}", columns, cells)
        self._shown_at = state.global_step
        return bool(rows)

    def _write(self, args: Any, state: Any, answers: Any) -> list[Row]:
        """Write the rows on the main process and return them; none on the others."""
        if not state.is_world_process_zero:
            return []
        rows = self.rows(args, answers, self._of_reference)
        path = table_path(args.output_dir, self.folder, state.global_step)
        with in_spite_of_errors(str(path), OSError):
            write_rows(path, rows)
        return rows


def takes_part(args: Any, state: Any) -> bool:
    """Return whether this process computes: all do if weights are spread over them, else only the main one."""
    return state.is_world_process_zero or is_deepspeed_zero3_enabled() or is_fsdp(args.fsdp)


def tokenizer_of(processing_class: Any) -> Any:
    """Return the tokenizer, also of a processor."""
    return getattr(processing_class, "tokenizer", processing_class)


def text_of(prompt: Any) -> str:
    """Return a prompt as text: a conversation as its messages' contents, one a line."""
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def write_credit(path: Path, step: int, answers: list[Row]) -> None:
    """Write answers by token, if there are any yet; the report reads what is newest in the folder `credit`."""
    if answers:
        write_rows(path, [{"step": step} | answer for answer in answers])


def table_path(output_dir: str, folder: str, step: int) -> Path:
    return Path(output_dir) / folder / f"step_{step:05d}.jsonl"
