"""Pictures and tables of a run, made from what the Trainer has logged. Imports no trainer."""

from .curves import ppo_curves, reward_curves
from .progress import PPO_LINE, REWARD_LINE, use_brief_progress
from .tables import Sample, pair_samples, print_samples, samples_markdown


__all__ = [
    "PPO_LINE",
    "REWARD_LINE",
    "Sample",
    "pair_samples",
    "ppo_curves",
    "print_samples",
    "reward_curves",
    "samples_markdown",
    "use_brief_progress",
]
