"""
What a vLLM server has been asked for and has not handed over yet.

Only the request itself runs in another thread, on the main process. All else, and every collective, stays where TRL
has it: the prompts are gathered and the answers are broadcast by its own code, around `vllm_client.generate`.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any


logger = logging.getLogger(__name__)

KEPT = ("version", "request", "answer")  # of a rollout in a checkpoint
LOOKS_UP = 0.2  # seconds after which who waits for the server sees whether to go on waiting
NOTHING: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None}


class Asked:
    """
    A rollout that the server has been asked for.

    Attributes:
        version: the rollout before which the weights were sent that it is sampled with, counted from 0.
        request, answer: the arguments of TRL's `vllm_client.generate` and what it returned, on the main process.
        error: what it raised.
        done: set once there is an answer or an error.
        is_restored: whether it comes from a checkpoint.
    """

    def __init__(self, version: int, is_restored: bool = False):
        self.version, self.is_restored = version, is_restored
        self.request: dict[str, Any] = {}
        self.answer: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.done = threading.Event()


class ServerQueue:
    """
    The rollouts that a server has been asked for and that are not learned from yet, in order. Every process counts
    them; the main one has the requests and the answers.

    Args:
        vllm_generation: TRL's, whose client is asked through this, and whose weights are sent while the server
            generates nothing.
    """

    def __init__(self, vllm_generation: Any):
        self._queue: deque[Asked] = deque()
        self._adds: Asked | None = None  # the request that TRL is about to make is for this rollout
        self._due: int | None = None  # it is for the rollout that is due, the server's weights being of this version
        self._last: Asked | None = None  # the one sent last
        self._waited = self._busy = 0.0
        self._since = time.perf_counter()
        client = getattr(vllm_generation, "vllm_client", None)  # the main process has one
        if client is not None:
            self._generate, client.generate = client.generate, self._answer
        send = vllm_generation.sync_weights

        def send_when_idle() -> None:
            self.wait()
            send()

        vllm_generation.sync_weights = send_when_idle

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def is_generating(self) -> bool:
        return self._last is not None and not self._last.done.is_set()

    # ---- Ask ----

    def ask(self, version: int, generate: Callable[[], Any]) -> None:
        """Ask for the next rollout, by what `generate` asks; `version` is that of the server's weights."""
        self._adds = Asked(version)
        try:
            generate()
            self._queue.append(self._adds)
        finally:
            self._adds = None

    def take(self, version: int, generate: Callable[[], Any]) -> tuple[Any, int]:
        """
        Return what `generate` makes of the first rollout of the queue, which is due, and by how many versions its
        weights are older than the server's, of this `version`.
        """
        due, self._due = self._queue[0], version
        try:
            return generate(), version - due.version
        finally:
            self._due = None
            self._queue.popleft()

    def wait(self) -> None:
        """Wait until the server generates nothing; raise, once, what it has answered with."""
        last, self._last = self._last, None
        if last is not None:
            self._finish(last)

    def settle(self, gives_up: Callable[[], bool] = lambda: False) -> None:
        """Wait until the server generates nothing, whatever it answers, or until `gives_up` returns true."""
        if self._last is not None:
            self._await(self._last, gives_up)

    def forget(self) -> None:
        """Wait until the server generates nothing, and drop what it has been asked for."""
        self.settle()
        self._queue.clear()
        self._last = None
        self.pop_seconds()

    def pop_seconds(self) -> dict[str, float]:
        """
        Return the seconds since the last call in which the main process waited for the server, and those in which the
        server generated nothing of a training rollout.
        """
        now = time.perf_counter()
        seconds = {"server_wait": self._waited, "server_idle": max(0.0, now - self._since - self._busy)}
        self._waited, self._busy, self._since = 0.0, 0.0, now
        return seconds

    def _await(self, asked: Asked, gives_up: Callable[[], bool] = lambda: False) -> None:
        start = time.perf_counter()
        while not asked.done.wait(LOOKS_UP) and not gives_up():
            pass
        self._waited += time.perf_counter() - start

    def _finish(self, asked: Asked) -> None:
        self._await(asked)
        if asked.error is not None:
            raise asked.error

    def _answer(self, **request: Any) -> dict[str, Any]:
        """Stand in for TRL's `vllm_client.generate`, on the main process."""
        if self._adds is not None:
            self._send(self._adds, request)
            return NOTHING
        if self._due is not None:
            due = self._queue[0]
            if due.request == request:
                self._finish(due)
                assert due.answer is not None
                return due.answer
            self._say_why(due, request)
            due.version = self._due
        self.wait()
        return self._generate(**request)

    def _send(self, asked: Asked, request: dict[str, Any]) -> None:
        before, self._last, asked.request = self._last, asked, request

        def run() -> None:
            if before is not None:
                before.done.wait()
            start = time.perf_counter()
            try:
                asked.answer = self._generate(**request)
            except BaseException as error:
                asked.error = error
            self._busy += time.perf_counter() - start
            asked.done.set()

        threading.Thread(target=run, daemon=True).start()  # it may not hold up the end of the program

    @staticmethod
    def _say_why(due: Asked, request: dict[str, Any]) -> None:
        """Raise `ValueError` if the rows of a rollout were others when they were read ahead; else warn."""
        others = sorted(name for name in request if due.request.get(name) != request[name])
        if others == ["prompts"] and not due.is_restored:
            raise ValueError(
                "The prompts of a rollout are not those that vLLM was asked for before: the dataset gives other rows "
                "when it is read a second time, as `rollout_lag` does. Make it give the same ones in the same order, "
                "or set `rollout_lag=0`."
            )
        logger.warning(
            "A rollout that was asked for ahead is sampled again, with the current weights: it was asked for with "
            "other %s.",
            ", ".join(others),
        )

    # ---- Save ----

    def answered(self) -> int:
        """Return how many rollouts have an answer before the first that has none; 0 but on the main process."""
        return next((i for i, each in enumerate(self._queue) if each.answer is None), len(self._queue))

    def state_dict(self, first: int) -> str:
        """Return the first rollouts of the queue as JSON."""
        return json.dumps([{name: getattr(each, name) for name in KEPT} for each in islice(self._queue, first)])

    def load_state_dict(self, state: str) -> None:
        """Go on from what `state_dict` has returned."""
        for kept in json.loads(state):
            asked = Asked(kept["version"], is_restored=True)
            asked.request, asked.answer = kept["request"], kept["answer"]
            asked.done.set()
            self._queue.append(asked)
