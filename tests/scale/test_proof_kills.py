"""Runs that are killed at random moments, several times each, end with the weights of the run that never was."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch

import killed_worker
import two_processes
from trl_ext.runs.checkpoints import fault_of, numbered


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
KILLS = int(os.environ.get("KILLS", "3"))  # of each kind


@pytest.mark.parametrize("kind", ["ppo", "dpo"])
def test_killed_run_ends_as_if_it_had_not_been(tmp_path, kind):
    seed = random.SystemRandom().randrange(10**6)
    print(f"\n{kind}: seed {seed}")
    draw, output = random.Random(seed), tmp_path / "killed"
    for step in [*sorted(draw.sample(range(1, killed_worker.STEPS), KILLS)), None]:
        command = [sys.executable, str(two_processes.ROOT / "tests" / "helpers" / "killed_worker.py"), kind, output]
        with subprocess.Popen(
            command, env=two_processes.environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            lines = (line.split()[-1] for line in process.stdout if line.startswith("after step"))
            first = int(next(lines))  # of this process; where there is none, it has failed
            if step is not None:
                if first < step:
                    next(line for line in lines if int(line) == step)
                time.sleep(draw.uniform(0, 0.2))  # a step and its save take about as long
                process.kill()
            process.communicate()
        complete = sorted(number for name, number in numbered(output).items() if fault_of(output / name) is None)
        unfinished = [path.name for path in output.glob("_*/*")]
        print(f"begun after step {first}, killed after {step}; complete: {complete}, unfinished: {unfinished}")
        assert len(complete) == len(numbered(output))
    expected, found = killed_worker.run(kind, tmp_path / "whole"), torch.load(output / "weights.pt")
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())
