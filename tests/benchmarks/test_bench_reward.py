"""The benchmark of reward training: its table compares medians, and each of its runs computes the tokens it claims."""

import contextlib
import json
from types import SimpleNamespace

import pytest

from commands import ROOT, script


def test_rows_compare_medians_without_first_steps():
    bench = script("bench_reward")
    theirs = {"seconds": [99.0, 4.0, 6.0], "cpu": [99.0, 6.0, 6.0], "tokens": [1, 300, 100], "peak_gb": 4.0}
    ours = {"seconds": [99.0, 2.0, 3.0], "cpu": [99.0, 4.0, 4.0], "tokens": [1, 100, 100], "peak_gb": 2.0}
    *_, last = bench.table({"trl": [theirs] * 2, "trl_ext": [ours, ours | {"peak_gb": 3.0}]}).splitlines()
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells[1:] == ["2.50", "4.00", "2.00 (1.50)", "100", "2.00", "3.0", "0.75"]


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_benchmark_runs_each_row_in_turns(monkeypatch, capsys):
    bench, results = script("bench_reward"), {}

    def run_here(command, stdout, stderr, env):
        assert command[1] == ROOT / "benchmarks" / "bench_reward.py"
        job = json.loads(command[2])
        with contextlib.redirect_stdout(stdout):
            bench.train(job)
        with open(job["result"]) as file:
            results[job["trainer"]] = json.load(file)["tokens"]
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run_here)
    monkeypatch.setattr("sys.argv", ["bench_reward.py", "--shape", "tiny", "--runs", "1", "--steps", "2"])
    bench.main()
    assert list(results) == [*bench.LAYOUTS]
    trls, sharing, packing, both = map(sum, results.values())
    assert both < min(sharing, packing)
    assert max(sharing, packing) < trls
    assert capsys.readouterr().out.splitlines()[-1].startswith("| `RewardTrainerX` |")
