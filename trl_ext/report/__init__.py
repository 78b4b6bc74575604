"""Pictures and tables of a run, made from what the Trainer has logged. Imports no trainer."""

from .curves import dpo_curves, ppo_curves, reward_curves
from .progress import DPO_LINE, PPO_LINE, REWARD_LINE, use_brief_progress
from .tables import Sample, accuracy_text, pair_samples, preference_table, print_samples, samples_markdown


__all__ = [
    "DPO_LINE",
    "PPO_LINE",
    "REWARD_LINE",
    "Sample",
    "accuracy_text",
    "dpo_curves",
    "pair_samples",
    "ppo_curves",
    "preference_table",
    "print_samples",
    "reward_curves",
    "samples_markdown",
    "use_brief_progress",
]
