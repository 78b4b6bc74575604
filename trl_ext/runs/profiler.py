"""`Phases`: measure the seconds and the peak memory of the phases of a run, such as generating and learning."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback


GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Phases(TrainerCallback):
    """
    A run is always in one phase or in none: time within an inner phase does not count for the outer one. As a callback
    it ends "learn", which a trainer enters with an optimizer step's first micro-batch, after the optimizer's step; so
    clocks and counters are read, and a GPU is waited for, at most twice in an optimizer step.

    Args:
        device: whose memory is counted. Of a GPU: what PyTorch has allocated for this process. Of a CPU: the process's
            resident memory with its libraries; only on Linux, which can reset its peak. Of others: none.
        counts_memory: switch it off if others read the same counters, which are reset here.

    Attributes:
        highest: peak in bytes, in any phase and between them, up to the last change of phase.
        parts: while an update is profiled, its finer phases.
        failed: the innermost phase that an error has left, of this training.
    """

    def __init__(self, device: torch.device, counts_memory: bool = True):
        self.device = device
        self.counts_memory = counts_memory
        self.highest = 0
        self.parts: Phases | None = None
        self.failed: str | None = None
        self._phase: str | None = None
        self._since = time.perf_counter()
        self.forget()

    def forget(self) -> None:
        """Drop what was measured."""
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._peaks: dict[str, int] = {}

    def enter(self, phase: str | None) -> None:
        """Begin a phase; `None` ends the current one."""
        if phase == self._phase:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its work goes on after the calls have returned
        now, peak = time.perf_counter(), take_peak(self.device) if self.counts_memory else None
        if self._phase is not None:
            self._seconds[self._phase].append(now - self._since)
            if peak is not None:
                self._peaks[self._phase] = max(peak, self._peaks.get(self._phase, 0))
        self.highest = max(self.highest, peak or 0)
        self._phase, self._since = phase, now

    @contextmanager
    def during(self, phase: str | None) -> Iterator[None]:
        """Within the context the run is in this phase; afterwards in the one before."""
        outer = self._phase
        with self.part(phase):
            self.enter(phase)
            try:
                yield
            except Exception:
                self.failed = self.failed or phase
                raise
            finally:
                self.enter(outer)

    @property
    def failed_in(self) -> str | None:
        """Return the phase in which an error has come; `None` between phases."""
        return self.failed or self._phase

    def part(self, name: str | None) -> AbstractContextManager[None]:
        """Name what the context does, which is measured while an update is profiled; an evaluation has no parts."""
        if self.parts is None or self._phase == "evaluate":
            return nullcontext()
        return self.parts.during(name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._phase = self.failed = None  # a run that ended with an error has left its phase open

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.enter(None)

    def pop_seconds(self) -> dict[str, list[float]]:
        """Return the seconds of every stay in each phase since the last call, on this process."""
        seconds, self._seconds = dict(self._seconds), defaultdict(list)
        return seconds

    def pop_memory(self, gather: Callable[[Tensor], Tensor], *phases: str) -> dict[str, float]:
        """Return `memory/<phase>`: peaks since the last call, the largest of all ranks, in GiB. All ranks call it."""
        names = [phase for phase in phases if phase in self._peaks]
        if not names:
            return {}
        peaks = torch.tensor([[self._peaks.pop(phase) / GIB for phase in names]], device=self.device)
        return {f"memory/{phase}": peak for phase, peak in zip(names, gather(peaks).amax(dim=0).tolist(), strict=True)}


def take_peak(device: torch.device) -> int | None:
    """Return the peak in bytes since the last call, by the device's counter, which is reset; `None` without one."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if device.type != "cpu":
        return None
    try:
        status = STATUS.read_text()
        CLEAR.write_text("5")  # the kernel's word for: the peak is what is resident now
    except OSError:  # not Linux, or not allowed
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
