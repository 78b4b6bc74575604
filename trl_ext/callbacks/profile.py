"""`ProfileCallback`: show where the time of one update goes, as a table and as a trace of torch's profiler."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import profile, record_function
from transformers import TrainerCallback

from ..runs.profiler import Phases
from ..runs.tables import show_table


logger = logging.getLogger(__name__)

FORWARD, BACKWARD, STEP, REST = "learn: forward", "learn: backward", "learn: optimizer step", "everything else"


class ProfileCallback(TrainerCallback):
    """
    Profiles the second update of a run, on the main process; the first one warms up. An update is a rollout of PPO
    with all its optimizer steps, and elsewhere an optimizer step. `profile/` in the run's folder gets `table.txt`,
    also shown on the terminal, and `trace.json.gz`, which chrome://tracing and https://ui.perfetto.dev open.

    The parts of every trainer are the forward pass with the loss, the backward pass, and the optimizer's step with the
    clipping before it; `PPOTrainerX` adds generating, and scoring by reward, critic and reference. Everything else is
    mostly Python. A GPU is waited for at the end of each part. Under DeepSpeed the backward pass includes the step.

    Args:
        trainer: any of transformers'.

    Attributes:
        seconds: of each part; together those of the update. Empty until it has ended.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seconds: dict[str, float] = {}
        self._phases: Phases | None = getattr(trainer, "phases", None)
        self._updates = 0  # that have begun
        self._profiler: profile | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._updates, self.seconds = 0, {}
        self._close()  # what an error has left open

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_amid_update:
            return
        self._updates += 1
        if self._updates == 2 and state.is_world_process_zero:
            self._open()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None:
            self._clock.enter(STEP)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None:
            self._clock.enter(REST)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._profiler is not None and not self._is_amid_update:
            self._clock.enter(None)
            profiler = self._profiler
            self._close()
            self._write(profiler, Path(args.output_dir) / "profile")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not self.seconds:
            logger.warning("Nothing is profiled: the run has ended before the end of its second update.")

    @property
    def _is_amid_update(self) -> bool:
        return getattr(self.trainer, "is_amid_rollout", False)

    def _open(self) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        self._clock = _Parts(accelerator.device, counts_memory=False)
        if self._phases is not None:
            self._phases.parts = self._clock
        # Replaced for this update only: all others run as without a profile.
        replaced = [(trainer, "compute_loss", FORWARD), (accelerator, "backward", BACKWARD)]
        replaced += [(trainer, "_clip_grad_norm", STEP)]
        self._originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        for owner, name, part in replaced:
            setattr(owner, name, self._measured(getattr(owner, name), part))
        self._profiler = profile()
        self._profiler.start()
        self._clock.enter(REST)

    def _measured(self, method: Callable, part: str) -> Callable:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._clock.during(part):
                return method(*args, **kwargs)

        return measured

    def _close(self) -> None:
        if self._profiler is None:
            return
        self._profiler.stop()
        self._profiler = None
        for owner, name, method in self._originals:
            setattr(owner, name, method)
        if self._phases is not None:
            self._phases.parts = None

    def _write(self, profiler: profile, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        self.seconds = {part: sum(stays) for part, stays in self._clock.pop_seconds().items()}
        whole = sum(self.seconds.values())
        rows = [*sorted(self.seconds.items(), key=lambda row: -row[1]), ("together", whole)]
        shown = [(part, f"{seconds:.3f}", f"{seconds / whole:.1%}") for part, seconds in rows]
        show_table(f"One update, in {folder}", ("part", "seconds", "share"), shown, folder / "table.txt")


class _Parts(Phases):
    """Phases that are named in the trace."""

    @contextmanager
    def during(self, phase: str | None) -> Iterator[None]:
        with record_function(str(phase)), super().during(phase):
            yield
