"""The figures of docs/tutorial.md, by the page's own commands and Python, on the real model and the human ratings."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from page_steps import ROOT, steps


pytestmark = [pytest.mark.measure, pytest.mark.filterwarnings("ignore")]


def run(line: str) -> None:
    """A line of the page as people type it."""
    command = [sys.executable, "-m", "trl_ext.cli", *shlex.split(line)[1:]]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    print(ended.stdout[-1500:])
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def metrics(run: str) -> dict:
    return json.loads(Path("outputs", run, "metrics.json").read_text())


def test_chain_runs_to_its_end_and_gives_the_figures_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    names = {}
    for language, text in steps("docs/tutorial.md"):
        start = time.perf_counter()
        if language == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), names)
        else:
            run(text)
        print(f"{time.perf_counter() - start:.0f} s: {text.strip().splitlines()[-1]}", flush=True)

    pairs = metrics("dpo")["after"]
    print(f"reward model {metrics('reward')['eval_accuracy']:.1%}, DPO {pairs['eval_preference/accuracy']:.1%}")
    assert metrics("reward")["eval_accuracy"] > 0.75
    assert pairs["eval_preference/accuracy_low"] > 0.5  # 320 pairs are few; 75% is for the demo's 640
    for name in ("ppo", "dpo-then-ppo"):
        before, after = metrics(name)["before"], metrics(name)["after"]
        rise, half_width, kl = (after[f"eval_{key}"] for key in ("reward/rise", "reward/rise_ci95", "kl/ref"))
        print(
            f"{name}: {before['eval_reward/score']:.3f} -> {after['eval_reward/score']:.3f}, "
            f"rise {rise:.3f} ± {half_width:.3f}; KL {kl:.2f} nats"
        )
        # Each starts where its own reference stands: the second one at the DPO policy.
        assert before["eval_kl/ref"] == pytest.approx(0, abs=1e-3)
        assert 0 < kl < 2
    assert names["trainer"].state.global_step > 0
