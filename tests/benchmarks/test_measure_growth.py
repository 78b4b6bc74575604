"""`benchmarks/measure_growth.py`: its straight lines, the sizes of its runs, and two points on a tiny model."""

import json
from types import SimpleNamespace

import pytest

from commands import script
from run_logs import png_size


def test_line_has_the_least_squares():
    slope, intercept, r2 = script("measure_growth").line([(0, 1), (1, 3), (2, 2), (3, 6)])
    assert (slope, intercept) == pytest.approx((1.4, 0.9))
    # 1 - residual / total, of the points 0.9, 2.3, 3.7, 5.1 on the line
    assert r2 == pytest.approx(1 - (0.1**2 + 0.7**2 + 1.7**2 + 0.9**2) / (2**2 + 0**2 + 1**2 + 3**2))


def test_runs_go_from_1k_to_32k_tokens_in_budgets_that_hold_every_sequence():
    growth = script("measure_growth")
    counts = [growth.tokens(growth.job(growth.CONFIG, batch, 2, 2048)) for batch in growth.BATCHES]
    assert counts == pytest.approx([1024 * 2**i for i in range(6)], rel=0.13)
    assert min(growth.BUDGETS) >= max(growth.PROMPTS) + max(growth.tail(128))


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_points_are_runs_and_are_drawn(tmp_path, monkeypatch, capsys):
    growth, worker = script("measure_growth"), script("bench_ppo_worker")
    jobs = []

    def run_here(command, env, **_):
        jobs.append((json.loads(command[2]), env.get("MALLOC_ARENA_MAX")))
        worker.main(jobs[-1][0])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", run_here)
    monkeypatch.setattr(growth, "CONFIG", script("bench_ppo_setup").TINY)
    monkeypatch.setattr(growth, "tail", lambda limit: [6])
    monkeypatch.setattr(growth, "BATCHES", (1, 2))
    monkeypatch.setattr(growth, "BUDGETS", (512, 1024))
    growth.main(["--updates", "2", "--picture", str(tmp_path / "growth.png")])
    assert [job["options"]["micro_batch_tokens"] for job, _ in jobs] == [2048, 2048, 512, 1024]
    assert [allocator for _, allocator in jobs] == [None, None, "1", "1"]
    assert capsys.readouterr().out.count("R² = 1.0000") == 2
    assert png_size(tmp_path / "growth.png")
