"""Runs that are killed at random moments, several times each, end with the weights of the run that never was."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import killed_worker
import two_processes
from trl_ext.runs.checkpoints import fault_of, numbered


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
LAST = f"checkpoint-{killed_worker.STEPS}"  # of a run that has come to its end
KILLS = int(os.environ.get("KILLS", "2"))  # of each
# All of the table where the number is given by hand; else three, drawn by the tests, as workers must collect the same.
DRAWS = (
    [[name] for name in killed_worker.TABLE]
    if "KILLS" in os.environ
    else [killed_worker.TABLE[i::3] for i in range(3)]
)


@pytest.fixture(scope="module")
def begin():
    """Begins a run; returns the number of its process and an iterator over the steps that it has done."""
    command = [sys.executable, str(two_processes.ROOT / "tests" / "helpers" / "killed_worker.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=two_processes.environment(), text=True, **pipes) as server:

        def start(kind, folder):
            print(kind, folder, file=server.stdin, flush=True)
            words = (line.split() for line in server.stdout)
            process = next(int(line[1]) for line in words if line[:1] == ["begun"])
            until_the_end = iter(lambda: next(words), ["ended"])
            return process, (int(line[1]) for line in until_the_end if line[:1] == ["after"])

        yield start
        server.stdin.close()


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


@pytest.mark.parametrize("names", DRAWS, ids=lambda names: " or ".join(names))
def test_killed_run_ends_as_if_it_had_not_been(begin, tmp_path, names):
    seed = random.SystemRandom().randrange(10**6)
    draw, output = random.Random(seed), tmp_path / "killed"
    kind = draw.choice(names)
    print(f"\n{kind}: seed {seed}")
    for step in sorted(draw.choices(range(1, killed_worker.STEPS - 1), k=KILLS)):
        process, steps = begin(kind, output)
        first = next(steps, killed_worker.STEPS)  # of this process; all had been done before the last kill
        if first < step:
            assert step in steps
        time.sleep(draw.uniform(0, 0.3))  # a step and its save take about as long
        with contextlib.suppress(ProcessLookupError):  # it was faster than the kill
            os.kill(process, signal.SIGKILL)
        list(steps)
        complete = sorted(number for name, number in numbered(output).items() if fault_of(output / name) is None)
        unfinished = [path.name for path in output.glob("_*/*")]
        print(f"begun after step {first}, killed after {step}; complete: {complete}, unfinished: {unfinished}")
        assert len(complete) == len(numbered(output))
        if (output / LAST).is_dir():
            break
    for folder in (output, tmp_path / "whole"):
        if not (folder / LAST).is_dir():
            list(begin(kind, folder)[1])
    found, expected = (
        {path.relative_to(folder): path.read_bytes() for path in (folder / LAST).glob("**/*.safetensors")}
        for folder in (output, tmp_path / "whole")
    )
    assert expected
    assert found == expected
