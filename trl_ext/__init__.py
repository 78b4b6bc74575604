"""
trl_ext: PPO with a critic and faster DPO for Hugging Face TRL, with every term of the loss named and logged.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .noise import leave_out_noise


if TYPE_CHECKING:
    from .callbacks import (
        ConvergenceCallback,
        ImplicitRewardCallback,
        KLControlCallback,
        PreferenceAccuracyCallback,
        ProfileCallback,
        ReportCallback,
        SampleCallback,
    )
    from .dpo.config import DPOConfigX
    from .dpo.implicit_reward import ImplicitReward
    from .dpo.trainer import DPOTrainerX
    from .models.fingerprint import save_base_fingerprint
    from .ppo.config import PPOConfigX
    from .ppo.pretraining import CriticConfigX, CriticTrainerX
    from .ppo.roles.critic import ValueHead
    from .ppo.trainer import PPOTrainerX
    from .reward.config import RewardConfigX
    from .reward.trainer import RewardTrainerX

__version__ = "0.1.0.dev0"

__all__ = [
    "ConvergenceCallback",
    "CriticConfigX",
    "CriticTrainerX",
    "DPOConfigX",
    "DPOTrainerX",
    "ImplicitReward",
    "ImplicitRewardCallback",
    "KLControlCallback",
    "PPOConfigX",
    "PPOTrainerX",
    "PreferenceAccuracyCallback",
    "ProfileCallback",
    "ReportCallback",
    "RewardConfigX",
    "RewardTrainerX",
    "SampleCallback",
    "ValueHead",
    "save_base_fingerprint",
]

# Public name -> its module, if that is not `callbacks`; imported on first use: the mathematics loads without TRL.
_HOMES = {
    "CriticConfigX": ".ppo.pretraining",
    "CriticTrainerX": ".ppo.pretraining",
    "DPOConfigX": ".dpo.config",
    "DPOTrainerX": ".dpo.trainer",
    "ImplicitReward": ".dpo.implicit_reward",
    "PPOConfigX": ".ppo.config",
    "PPOTrainerX": ".ppo.trainer",
    "RewardConfigX": ".reward.config",
    "RewardTrainerX": ".reward.trainer",
    "ValueHead": ".ppo.roles.critic",
    "save_base_fingerprint": ".models.fingerprint",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    leave_out_noise()  # before what is imported next
    return getattr(import_module(_HOMES.get(name, ".callbacks"), __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
