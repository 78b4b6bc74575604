"""
Callbacks for TRL's trainers and for those of `trl_ext`. They read what a trainer logs; none imports one.
"""

from .convergence import ConvergenceCallback
from .implicit_reward import ImplicitRewardCallback
from .kl_control import KLControlCallback
from .preference_accuracy import PreferenceAccuracyCallback
from .report import ReportCallback
from .samples import SampleCallback


__all__ = [
    "ConvergenceCallback",
    "ImplicitRewardCallback",
    "KLControlCallback",
    "PreferenceAccuracyCallback",
    "ReportCallback",
    "SampleCallback",
]
