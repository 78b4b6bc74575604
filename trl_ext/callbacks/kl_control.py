"""`KLControlCallback`: control the KL in trainers that have no controller, and stop runs that leave the reference."""

from typing import Any

from transformers import TrainerCallback

from ..ppo.controllers import KLController
from ..runs.log import reference_kl


class KLControlCallback(TrainerCallback):
    """
    Moves the KL coefficient of `trl.GRPOTrainer` and `trl.RLOOTrainer`, their constant `beta`, by the KL that they
    log, and stops a run whose KL stays too large. `PPOTrainerX` has its own controllers (`kl_controller`), which this
    does not replace; the stop works there too. TRL logs the KL per token: it is multiplied by the mean length, so that
    controllers read nats per sequence, as in PPO. The coefficient is logged as `coef/kl`; a resumed run continues with
    it.

    Args:
        trainer: whose `beta` to move; needed with `controller`.
        controller: one of `trl_ext.ppo.controllers`, such as `BandController(0.04)` or
            `ProportionalController(0.04, 2.0, 10_000)`; its coefficient replaces `beta`. `None`: no control.
        stop_above: nats per sequence; after `patience` log lines in a row above it the training ends.
        patience: log lines.

    Raises:
        ValueError: for nothing to do; for a trainer without a KL coefficient in its loss, or with its own controllers.
    """

    def __init__(
        self,
        trainer: Any = None,
        controller: KLController | None = None,
        stop_above: float | None = None,
        patience: int = 3,
    ):
        if controller is None and stop_above is None:
            raise ValueError("Nothing to do: give a `controller`, `stop_above`, or both.")
        if controller is not None:
            check_trainer(trainer)
        if stop_above is not None and not stop_above > 0:
            raise ValueError(f"`stop_above` is {stop_above}; it must be above 0, in nats per sequence.")
        if patience < 1:
            raise ValueError(f"`patience` is {patience}; it must be at least one log line.")
        self.trainer, self.controller, self.stop_above, self.patience = trainer, controller, stop_above, patience
        self._seen = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.global_step
        if self.controller is not None:
            known = [line["coef/kl"] for line in state.log_history if line.get("coef/kl") is not None]
            if state.global_step and known:  # resumed
                self.controller.coef = float(known[-1])
            self.trainer.beta = self.controller.coef

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps, values = reference_kl(state.log_history)
        if not steps or steps[-1] != state.global_step or steps[-1] <= self._seen:
            return
        if self.controller is not None:
            state.log_history[-1]["coef/kl"] = self.controller.coef  # the one that this KL was measured under
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self.controller.update(values[-1], episodes=per_step * (steps[-1] - self._seen))
            self.trainer.beta = self.controller.coef
        self._seen = steps[-1]
        late = values[-self.patience :]
        if self.stop_above is not None and len(late) == self.patience and min(late) > self.stop_above:
            if state.is_world_process_zero:
                print(
                    f"Step {state.global_step}: the KL to the reference has been above {self.stop_above:g} nats per "
                    f"sequence for {self.patience} log lines, {values[-1]:.3g} now. The run stops here.",
                    flush=True,
                )
            control.should_training_stop = True


def check_trainer(trainer: Any) -> None:
    """Raise `ValueError` for a trainer whose KL coefficient cannot be moved from outside."""
    args = getattr(trainer, "args", None)
    if hasattr(args, "kl_controller"):
        raise ValueError(
            f"{type(trainer).__name__} has its own KL controllers: set `kl_controller`, `kl_target` or "
            "`kl_band` in its config, and leave `controller` out."
        )
    if not hasattr(trainer, "beta") or not hasattr(trainer, "num_generations"):
        raise ValueError(
            f"`controller` moves the `beta` of a GRPOTrainer or RLOOTrainer; the `trainer` given is a "
            f"{type(trainer).__name__} ({type(args).__name__}). In DPO, β is no coefficient of a term; it is fixed."
        )
    if trainer.beta == 0:
        raise ValueError(
            "The trainer's `beta` is 0, so it has no reference and measures no KL: start with a `beta` above 0."
        )
