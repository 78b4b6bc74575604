"""Pages, pictures and tables of a run, made from what the Trainer has logged. Imports no trainer."""

from .page import write_report
from .progress import DPO_LINE, PPO_LINE, REWARD_LINE, use_brief_progress
from .run import Run, read_run
from .tables import (
    Sample,
    accuracy_text,
    first_and_last_evaluation,
    pair_samples,
    preference_table,
    print_samples,
    samples_markdown,
)


__all__ = [
    "DPO_LINE",
    "PPO_LINE",
    "REWARD_LINE",
    "Run",
    "Sample",
    "accuracy_text",
    "first_and_last_evaluation",
    "pair_samples",
    "preference_table",
    "print_samples",
    "read_run",
    "samples_markdown",
    "use_brief_progress",
    "write_report",
]
