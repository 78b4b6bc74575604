"""A process that fails ends the run: the others stop, in time, and what is printed says which failed and why."""

import subprocess
import time

import pytest

import two_processes
import zero_runs


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    "end, said", [("error", "RuntimeError: the reward of rank 1 has failed"), ("killed", "Signal 9 (SIGKILL)")]
)
def test_run_ends_when_a_process_dies(tmp_path, end, said):
    zero_runs.save(tmp_path)
    worker = two_processes.ROOT / "tests" / "helpers" / "dying_worker.py"
    command = [*two_processes.TORCHRUN, str(two_processes.ON_CPU), str(worker), end, str(tmp_path)]
    result = subprocess.run(
        command, env=two_processes.environment(), cwd=two_processes.ROOT, capture_output=True, text=True, timeout=240
    )
    seconds = time.time() - float((tmp_path / "died").read_text())
    assert result.returncode != 0
    assert seconds < 60, "the other process hung"
    summary = result.stderr[result.stderr.index("Root Cause (first observed failure)") :]
    assert "rank      : 1" in summary
    assert said in summary
    print(f"\n{end}: the run ended {seconds:.0f} s after")
