"""
Runs that are killed at random moments end with the weights of the run that never was.

    KILLS=25 .venv/bin/pytest -m proof -s tests/scale/test_proof_kills.py

kills each set-up so often, in as many runs as that takes, and each layout of two processes five times.
"""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from safetensors.torch import load_file

import killed_worker
import two_processes
import zero_runs
from trl_ext.runs.checkpoints import fault_of, numbered


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
LAST = f"checkpoint-{killed_worker.STEPS}"  # of a run that has come to its end
KILLS = int(os.environ.get("KILLS", "2"))  # of each
BY_HAND = "KILLS" in os.environ


def draws(table, count):
    """All of a table by hand; else so many lines, which the tests draw, as workers must collect the same."""
    return [[name] for name in table] if BY_HAND else [list(table)[i::count] for i in range(count)]


BEFORE_THE_FIRST_STEP, OF_A_STEP = 1.5, 0.3  # seconds; a step's with its save
HANGS = 120.0  # seconds, after which a process that another has left is ended


class Run:
    """A run that the server has begun."""

    def __init__(self, server, *words):
        print(*words, file=server.stdin, flush=True)
        self._lines = (line.split() for line in server.stdout)
        self.processes = self._next("begun")
        self.codes = None  # of its processes, once it has ended

    def _next(self, *wanted):
        word, *numbers = next(line for line in self._lines if line and line[0] in wanted)
        self.codes = [int(code) for code in numbers] if word == "ended" else None
        return [int(number) for number in numbers]

    def await_step(self):
        if self.codes is None:
            self._next("after", "ended")

    def await_end(self):
        while self.codes is None:
            self.await_step()
        return self.codes

    def kill(self, ranks):
        """Kills these and waits for the others, which may not hang; returns how long they took, in seconds."""
        begun = time.monotonic()
        self._end(ranks)
        others = threading.Timer(HANGS, self._end, [range(len(self.processes))])
        others.start()
        self.await_end()
        others.cancel()
        return time.monotonic() - begun

    def _end(self, ranks):
        for rank in ranks:
            with suppress(ProcessLookupError):  # it was faster
                os.kill(self.processes[rank], signal.SIGKILL)


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Begins a run of a kind in a folder."""
    command = [sys.executable, str(two_processes.ROOT / "tests" / "helpers" / "killed_worker.py")]
    models = tmp_path_factory.mktemp("models")
    zero_runs.save(models)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": two_processes.ROOT}
    with (
        (models / "errors").open("w") as errors,
        subprocess.Popen(command, env=two_processes.environment(), stderr=errors, **pipes) as server,
    ):
        yield lambda kind, folder: Run(server, kind, folder, models)
        server.stdin.close()


def killed_to_the_end(begin, kind, folder, draw, kills, ranks):
    """
    Begins a run again and again until it is done, and kills it at random moments, up to so often; returns how often.

    Args:
        ranks: those that a kill ends, for one kill after the other.
    """
    count = 0
    while not (folder / LAST).is_dir():
        run = begin(kind, folder)
        if count == kills:
            assert set(run.await_end()) == {0}
            break
        steps = draw.randrange(killed_worker.STEPS - 2)
        for _ in range(steps):
            run.await_step()
        time.sleep(draw.uniform(0, OF_A_STEP if steps else BEFORE_THE_FIRST_STEP))
        doomed = ranks[(kills - count) % len(ranks)]
        seconds = run.kill(doomed)
        was_killed = all(run.codes[rank] == -signal.SIGKILL for rank in doomed)
        others = [code for rank, code in enumerate(run.codes) if rank not in doomed]
        count += was_killed
        complete = sorted(number for name, number in numbered(folder).items() if fault_of(folder / name) is None)
        unfinished = [path.name for path in folder.glob("_*/*")]
        print(f"killed {doomed}: exit codes {run.codes} in {seconds:.1f} s; complete: {complete}, {unfinished=}")
        assert len(complete) == len(numbered(folder))
        assert all(code > 0 or (folder / LAST).is_dir() for code in others), "a process that was left has hung"
    return count


def weights_of(folder):
    """Of the last checkpoint, by file and name."""
    files = (folder / LAST).glob("**/*.safetensors")
    weights = {(path.parent.name, name): each for path in files for name, each in load_file(path).items()}
    assert weights
    return weights


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max((weight - expected[name]).abs().max().item() for name, weight in found.items())


def test_every_pair_is_in_the_table():
    rows = [name.split("-")[1:] for name in killed_worker.TABLE if name.startswith("ppo-")]
    columns = [
        ("model", "head", "adapter"),
        ("fixed", "proportional", "band"),
        ("whole", "lora"),
        ("within", "between"),
    ]
    there = {pair for row in rows for pair in itertools.combinations(row, 2)}
    pairs = {pair for two in itertools.combinations(columns, 2) for pair in itertools.product(*two)}
    assert pairs - there == {("adapter", "whole")}  # which needs an actor that is an adapter


def ends_killed(begin, folder, kinds, kills, ranks, tolerance=0.0):
    """Draws one of the kinds, kills its runs, as many as it takes, and compares each with one that was not killed."""
    seed = random.SystemRandom().randrange(10**6)
    draw, left = random.Random(seed), kills
    kind = draw.choice(kinds)
    print(f"\n{kind}: seed {seed}")
    assert set(begin(kind, folder / "whole").await_end()) == {0}
    expected = weights_of(folder / "whole")
    for number in itertools.count():
        killed = folder / f"killed-{number}"
        left -= killed_to_the_end(begin, kind, killed, draw, left, ranks)
        differs = largest_difference(weights_of(killed), expected)
        print(f"run {number}: {differs:.1e} from the whole one, {left} kills left")
        assert differs <= tolerance
        if not left:
            break


@pytest.mark.parametrize("kinds", draws(killed_worker.TABLE, 3), ids=" or ".join)
def test_killed_run_ends_as_if_it_had_not_been(begin, tmp_path, kinds):
    ends_killed(begin, tmp_path, kinds, KILLS, [[0]])


@pytest.mark.skipif(not BY_HAND, reason="a process that waits for a killed one takes up to a minute to end")
@pytest.mark.parametrize("kinds", draws(killed_worker.OF_TWO, 1), ids=" or ".join)
def test_run_of_two_processes_of_which_some_are_killed_ends_as_if_they_had_not_been(begin, tmp_path, kinds):
    """Both, or one, whose end the other notices by itself: no launcher ends it."""
    ends_killed(begin, tmp_path, kinds, min(KILLS, 5), [[1], [0, 1], [0]], tolerance=1e-6)
