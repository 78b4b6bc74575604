"""`RunState`: everything that a run of PPO changes beside weights, optimizer and random numbers."""

from dataclasses import dataclass, field
from typing import Any

from .coefficients import Coefficients
from .evaluation import HeldOut
from .metrics import LossLedger
from .rewards import RunningMoments
from .rollout import MicroBatch, Rollout


@dataclass
class EarlyStop:
    """
    Ends the learning from a rollout once an optimizer step has moved the policy too far.

    Args:
        target_kl: KL[π_old ‖ π_θ] beyond which the rest of a rollout is skipped, nats per token; None: never.
    """

    target_kl: float | None
    stopped: bool = False
    left_out_steps: int = 0  # of the open logging window

    def saw(self, old_kl: float) -> None:
        """Take note of an optimizer step's KL[π_old ‖ π_θ], the same number on every rank."""
        self.stopped = self.target_kl is not None and old_kl > self.target_kl

    def pop_log(self) -> dict[str, float]:
        """Return the log entry of the optimizer steps that were skipped since the last call."""
        left_out, self.left_out_steps = self.left_out_steps, 0
        return {"policy/steps_left_out": left_out} if self.target_kl is not None or left_out else {}

    def state_dict(self) -> dict[str, Any]:
        return {"stopped": self.stopped, "left_out_steps": self.left_out_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped, self.left_out_steps = state["stopped"], state["left_out_steps"]


@dataclass
class CriticWarmup:
    """
    The steps at the start in which only the critic learns.

    Args:
        steps: so many optimizer steps at least.
        until: explained variance against rewards-to-go that a rollout has to reach as well; None: `steps` alone.
    """

    steps: int
    until: float | None
    reached: bool = False

    def saw(self, explained: float) -> None:
        """Take note of a rollout's explained variance, the same number on every rank; NaN where it is undefined."""
        self.reached |= self.until is not None and explained >= self.until

    def holds(self, step: int) -> bool:
        """Return whether only the critic learns in this optimizer step."""
        return step < self.steps or (self.until is not None and not self.reached)

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached = state["reached"]


@dataclass
class RunState:
    """
    Everything that a run changes beside weights, optimizer and random numbers.

    Args:
        coefficients: the weights of the loss terms, with the controllers that move them.
        held_out: the evaluations, with the first scores that later ones are compared with.
        early_stop: whether the rest of this rollout is skipped.
        warmup: whether only the critic learns.
        reward_moments: of all scores so far, for `normalize_rewards`.
        ledger: the loss terms of the open logging window.
        rollout: the one that is being learned from.
        packs: whether its sequences stand in rows without padding; `None` in checkpoints of earlier versions.
        micro_batches: of this pass over the rollout, those of each step of the Trainer.
        passes_over_data: finished passes before this run was resumed.
    """

    coefficients: Coefficients
    held_out: HeldOut
    early_stop: EarlyStop
    warmup: CriticWarmup
    reward_moments: RunningMoments = field(default_factory=RunningMoments)
    ledger: LossLedger = field(default_factory=LossLedger)
    rollout: Rollout | None = None
    packs: bool | None = None
    micro_batches: list[list[MicroBatch]] = field(default_factory=list)
    passes_over_data: int = 0

    def state_dict(self, is_learning: bool, passes_over_data: int) -> dict[str, Any]:
        """Return this rank's state for a checkpoint, with the rollout if the run `is_learning` from it."""
        learned_from = self.rollout if is_learning else None
        return {name: getattr(self, name).state_dict() for name in _PARTS} | {
            "rollout": None if learned_from is None else learned_from.tensors(),
            "packs": self.packs,
            "micro_batches": [
                [(each.rows, each.num_tokens, each.share, each.num_positive) for each in step]
                for step in (self.micro_batches if learned_from else ())
            ],
            "passes_over_data": passes_over_data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint of this rank."""
        for name in _PARTS:
            getattr(self, name).load_state_dict(state[name])
        if state["rollout"] is not None:
            self.rollout = rollout = Rollout(**state["rollout"])
            self.packs = state.get("packs")
            self.micro_batches = [[MicroBatch(rollout, *each) for each in step] for step in state["micro_batches"]]
        self.passes_over_data = state["passes_over_data"]


_PARTS = ("coefficients", "held_out", "early_stop", "warmup", "reward_moments", "ledger")
