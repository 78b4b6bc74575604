"""`benchmarks/bench_overlap.py` on short runs, with a real vLLM server; `make test-vllm`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """What the script prints, given its arguments; a command in a process of its own, as it stays on one core."""
    folder = tmp_path_factory.mktemp("overlap")

    def run(*words):
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_overlap.py"), *words]
        command += ["--cache", str(folder), "--file", str(folder / "runs.jsonl")]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=600).stdout

    return run


def test_seconds_of_a_rollout_with_and_without_overlap_stand_beside_what_phases_foretell(bench):
    rows = [row.split("|")[1:-1] for row in bench("times", "--samples", "384").splitlines() if row.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["task", "sorting", "late score"]
    for row in rows[1:]:
        generate, rest, both, lag_0, longer, lag_1, idle, _ = map(float, row[1:])
        assert generate + rest == pytest.approx(both, abs=0.02)
        assert longer == max(generate, rest)
        assert min(lag_0, lag_1) > 0
        assert idle < lag_1


def test_every_lag_learns_from_samples_of_its_age_and_finished_runs_are_kept(bench):
    words = ("learning", "--samples", "640", "--seeds", "1", "2")
    printed = bench(*words)
    apart = [float(row.split("|")[-2]) for row in printed.splitlines() if re.match(r"\| [012] ", row)]
    assert apart[0] < 1e-4
    assert min(apart[1:]) > 1e-2
    again = bench(*words)
    assert again.splitlines() == printed.splitlines()[-6:]  # no run, and the same table
