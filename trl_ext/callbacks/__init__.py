"""
Callbacks for TRL's trainers and for those of `trl_ext`. They read what a trainer logs; none imports one.

    report                the report of a run, kept up to date
    convergence           whether a run has converged or diverges
    kl_control            a KL controller for trainers that have none
    preference_accuracy   the accuracy on pairs with its interval
    samples               completions of fixed prompts over time
    implicit_reward       implicit rewards of single pairs over time
    profile               where the time of one update goes
    tables                a model's answers beside its reference's
"""

from .convergence import ConvergenceCallback
from .implicit_reward import ImplicitRewardCallback
from .kl_control import KLControlCallback
from .preference_accuracy import PreferenceAccuracyCallback
from .profile import ProfileCallback
from .report import ReportCallback
from .samples import SampleCallback


__all__ = [
    "ConvergenceCallback",
    "ImplicitRewardCallback",
    "KLControlCallback",
    "PreferenceAccuracyCallback",
    "ProfileCallback",
    "ReportCallback",
    "SampleCallback",
]
