"""`ConvergenceCallback`: says when a run has converged or diverges, and can stop it."""

from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ..runs.convergence import CONVERGED, DIVERGING, KL_BAND, MIN_ACCURACY, WINDOW, Verdict, check_criteria, verdict


class ConvergenceCallback(TrainerCallback):
    """
    Applies the criteria of Zhang 2025 §6.2, [`trl_ext.runs.convergence.verdict`], to every log line, as the report
    does: for PPO, GRPO and RLOO a KL to the reference within its band and a reward that has risen and is flat; for DPO
    and reward models the share of held-out pairs in the right order. Prints the verdict when its status changes.

    Args:
        stop_when: statuses that end the training: "converged", "diverging", or both.
        kl_band: nats per sequence.
        window: log lines over which the KL is averaged and the reward must be flat.
        min_accuracy: share of held-out pairs above which its 95% interval must lie, 0.5 to 1.

    Attributes:
        verdict: the last one; `None` before the first log line.

    Raises:
        ValueError: for an unknown status, or criteria that no run can meet.
    """

    def __init__(
        self,
        stop_when: Sequence[str] = (),
        kl_band: Sequence[float] = KL_BAND,
        window: int = WINDOW,
        min_accuracy: float = MIN_ACCURACY,
    ):
        stop_when = (stop_when,) if isinstance(stop_when, str) else tuple(stop_when)
        unknown = sorted(set(stop_when) - {CONVERGED, DIVERGING})
        if unknown:
            raise ValueError(f"`stop_when` holds {unknown}; choose from {CONVERGED!r} and {DIVERGING!r}.")
        check_criteria(kl_band, window, min_accuracy)
        self.stop_when = stop_when
        self.criteria: dict[str, Any] = {"kl_band": kl_band, "window": window, "min_accuracy": min_accuracy}
        self.verdict: Verdict | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.verdict = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known, self.verdict = self.verdict, verdict(state.log_history, **self.criteria)
        stops = self.verdict.status in self.stop_when
        if state.is_world_process_zero and (known is None or known.status != self.verdict.status):
            print(f"Step {state.global_step}: {self.verdict}.{' The run stops here.' if stops else ''}", flush=True)
        if stops:  # every rank reads the same log, so all stop together
            control.should_training_stop = True
