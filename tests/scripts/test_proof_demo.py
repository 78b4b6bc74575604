"""What docs/demo.md claims, by the README's own commands, on the real model and the human ratings.

`make proof` trains the reward model, and DPO on half its pairs; `make measure` trains DPO on all and PPO with both
critics. Both print the figures.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset

from trl_ext.data import demo


ROOT = Path(__file__).parents[2]

# A head starts from zero and takes larger steps than a critic that starts as the reward model.
CRITICS = [("model",), ("head", "--critic_learning_rate", "1e-3")]


def run(script: str, output: Path, *flags: str) -> dict:
    """`python scripts/<script> --output_dir <output> ...`, with all cores if nothing runs beside; its metrics.json."""
    environ = dict(os.environ)
    if "PYTEST_XDIST_WORKER" not in environ:
        environ.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(ROOT / "scripts" / script), "--output_dir", str(output), *flags]
    start = time.perf_counter()
    ended = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    print(f"\n{script} {' '.join(flags)}: {time.perf_counter() - start:.0f} s")
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("demo") / "reward"
    return output, run("reward.py", output, "--test_size", "250")


def known_words(texts: list[str], vocabulary: set[str]) -> float:
    """The share of words that people use in movie reviews."""
    words = [word for text in texts for word in re.findall(r"[a-z']+", text.lower())]
    return sum(word in vocabulary for word in words) / len(words)


def completions(output: Path, step: int) -> list[str]:
    return Dataset.from_parquet(str(output / "completions" / f"completions_{step:05d}.parquet"))["completion"][:]


@pytest.mark.proof
def test_reward_model_orders_held_out_pairs_as_people_did(reward_run):
    _, metrics = reward_run
    print(f"{metrics['eval_accuracy']:.1%} of {metrics['eval_pairs']} held-out pairs in the right order")
    assert metrics["eval_accuracy"] >= 0.75


@pytest.mark.measure
@pytest.mark.parametrize("critic", CRITICS, ids=lambda flags: flags[0])
def test_ppo_raises_the_held_out_score_within_the_band(reward_run, critic):
    reward_model, _ = reward_run
    output = reward_model.with_name(f"ppo-{critic[0]}")
    flags = ("--reward_model_path", str(reward_model), "--test_size", "288", "--critic", *critic)
    metrics = run("ppo.py", output, *flags)
    before, after = metrics["before"], metrics["after"]
    rise, half_width, kl = (after[f"eval_{key}"] for key in ("reward/rise", "reward/rise_ci95", "kl/ref"))
    vocabulary = set(re.findall(r"[a-z']+", " ".join(demo.movie_reviews()["text"]).lower()))
    english = [known_words(completions(output, line["step"]), vocabulary) for line in (before, after)]
    print(
        f"critic={critic[0]}: held-out score {before['eval_reward/score']:.3f} -> {after['eval_reward/score']:.3f}, "
        f"rise {rise:.3f} ± {half_width:.3f}; KL {kl:.2f} nats; words known {english[0]:.1%} -> {english[1]:.1%}"
    )
    assert rise > half_width
    assert 0.5 <= kl <= 2
    assert english[1] > max(0.9, english[0] - 0.05)


# Half as many steps are larger ones.
HALF = ("--train_size", "320", "--test_size", "128", "--learning_rate", "1.5e-4")


@pytest.mark.parametrize(
    "flags",
    [pytest.param(HALF, marks=pytest.mark.proof, id="half"), pytest.param((), marks=pytest.mark.measure, id="all")],
)
def test_dpo_orders_held_out_pairs_as_people_did(tmp_path, flags):
    metrics = run("dpo.py", tmp_path / "dpo", *flags)
    before, after = metrics["before"], metrics["after"]
    print(
        f"{after['eval_preference/accuracy']:.1%} of {after['eval_preference/pairs']:.0f} held-out pairs in the right "
        f"order; chosen likelier in {before['eval_preference/ranking_accuracy']:.1%} before and "
        f"{after['eval_preference/ranking_accuracy']:.1%} after"
    )
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert after["eval_preference/accuracy"] > 0.75
    if not flags:  # of 128 pairs too few change places
        assert after["eval_preference/ranking_accuracy"] > before["eval_preference/ranking_accuracy"]
