"""
Pages, pictures and tables of a run, made from what the Trainer has logged. Imports no trainer.

    run                 what a run's folder says of it
    tables              samples before and after, implicit rewards of pairs
    credit              answers whose tokens have the colour of their credit
    progress            a progress bar with one short line per log; it alone imports transformers
    chart               curves with their axes, as data
    drawing             colours; charts drawn with matplotlib
    panel               what the page shows of some log keys
    policy_panels       the panels of PPO, GRPO and RLOO
    preference_panels   the panels of DPO and reward models
    machine_panels      the panels of time and memory
    pictures            the panels of a run; a PNG of them
    results             first and last values; which of several runs did best
    embedded            what the page carries to draw its curves: data, uPlot, page.js
    page                the HTML page
"""

from .page import write_report
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
    "Run",
    "Sample",
    "accuracy_text",
    "first_and_last_evaluation",
    "pair_samples",
    "preference_table",
    "print_samples",
    "read_run",
    "samples_markdown",
    "write_report",
]
