"""Notice SIGTERM and SIGINT during a training, so that the run can end its step, save and stop."""

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


CAUGHT = (signal.SIGTERM, signal.SIGINT)
# Within so many seconds, a second signal is the same one: a launcher passes on what its processes have got, too.
AGAIN = 2.0
END = 0  # in a watch's pipe, where the other numbers are those of signals
_pipes: set[int] = set()  # of watches that are on


class StoppedBySignal(SystemExit):
    """
    Ends a program whose run a signal has stopped, with the exit code of a shell: 143 for SIGTERM, 130 for SIGINT.
    `step` is the last optimizer step; `checkpoint` is its folder, `None` if nothing was learned yet.
    """

    def __init__(self, number: int, step: int, checkpoint: Path | None):
        super().__init__(128 + number)
        self.name, self.step, self.checkpoint = signal.Signals(number).name, step, checkpoint

    def __str__(self) -> str:
        return f"Stopped at step {self.step} by {self.name}."


class StopAmidStep(Exception):
    """Leaves a step of which nothing is learned yet."""


class SignalWatch:
    """
    Within the context, the first SIGTERM or SIGINT is noted in `received` and the second ends the process at once. The
    handlers that were there are put back.

    A handler in Python waits until a call of C code returns, which a collective without a partner may not do for half
    an hour. So a thread waits for the second signal, of which C code writes into a pipe as it comes.

    Args:
        speaks: whether this process says what it does, such as the first of several.
        then: what the first signal leads to.
    """

    def __init__(self, speaks: bool, then: str = "the run stops after this step and saves"):
        self.speaks, self.then = speaks, then
        self.received: int | None = None
        self._at = 0.0
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._pipe, self._pipe_before = -1, -1

    @property
    def age(self) -> float:
        """Return the seconds since the first signal, 0 before it."""
        return 0.0 if self.received is None else time.monotonic() - self._at

    def __enter__(self) -> "SignalWatch":
        if threading.current_thread() is not threading.main_thread():
            raise ValueError(
                "`save_on_signal` needs the main thread: Python gives signals to no other. Train in the main thread, "
                "or leave it out."
            )
        self._before = {caught: signal.signal(caught, self._note) for caught in CAUGHT}
        reads, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        _pipes.add(self._pipe)
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        threading.Thread(target=_await_second, args=(reads,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._pipe_before)
        _pipes.discard(self._pipe)
        os.write(self._pipe, bytes([END]))
        os.close(self._pipe)
        for caught, handler in self._before.items():
            signal.signal(caught, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return _in_forked_child(number)
        if self.received is None:
            self.received, self._at = number, time.monotonic()
            if self.speaks:  # unlike `print`, this may interrupt a `print`
                name = signal.Signals(number).name
                with suppress(OSError):
                    os.write(2, f"\n{name}: {self.then}. Once more, after {AGAIN:g} seconds, ends it now.\n".encode())
            _leave_broken_pipes()


def _await_second(pipe: int) -> None:
    """Read the numbers of signals as they come, and end the process at the second; end at the watch's end."""
    first: float | None = None
    while True:
        for number in os.read(pipe, 64):
            if number == END:
                os.close(pipe)
                return
            if number in CAUGHT:
                first = time.monotonic() if first is None else first
                if time.monotonic() - first >= AGAIN:
                    os._exit(128 + number)  # process 1 of a container would live on with the usual handler


def _leave_pipe() -> None:
    """In a forked process, do not write into its parent's pipe that a signal has come."""
    if _pipes:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_pipe)


@contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """
    Within the context, in which there is nothing to save yet, the first SIGTERM or SIGINT is a `KeyboardInterrupt`, a
    later one ends the process. The list that is yielded holds the first. Outside the main thread nothing changes.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    process, at = os.getpid(), [0.0]

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:
            return _in_forked_child(number)
        if not received:
            received.append(number)
            at[0] = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - at[0] >= AGAIN:
            os._exit(128 + number)

    before = {caught: signal.signal(caught, end) for caught in CAUGHT}
    try:
        yield received
        if received:  # where no exception can leave, as in `__del__`
            raise KeyboardInterrupt
    finally:
        for caught, handler in before.items():
            signal.signal(caught, signal.SIG_DFL if handler is None else handler)


def _in_forked_child(number: int) -> None:
    """Leave Ctrl-C to the trainer, whose step may need the child; end at SIGTERM, as `Process.terminate` expects."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _leave_broken_pipes() -> None:
    """Drop what is printed into a program that the same Ctrl-C has ended, such as `tee`: it would end the run."""
    pipes = [number for number in (1, 2) if _is_pipe(number)]
    if not pipes:
        return
    time.sleep(0.2)  # it ends about now
    poll = select.poll()
    for number in pipes:
        poll.register(number, 0)
    for number, event in poll.poll(0):
        if event & select.POLLERR:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _is_pipe(number: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(number).st_mode)
    except OSError:  # closed
        return False


def start_worker(start: Callable[[int], Any] | None, worker: int) -> None:
    """
    Start a worker of a data loader that a signal to the whole process group, as torchrun and Slurm send it, does not
    end: the trainer's step needs its rows. SIGTERM of the trainer itself does.

    Args:
        start: the loader's own `worker_init_fn`.
    """
    if start is not None:
        start(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_end, args=(os.getppid(),), daemon=True).start()


def _await_end(trainer: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)
