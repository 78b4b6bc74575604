"""Frozen models in host memory or 4 bits on two processes: under DDP and under real ZeRO-2."""

import math
from pathlib import Path

import pytest

import tiny
import two_processes


SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "frozen_layouts.py"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}  # what bitsandbytes can pack on a CPU


def save_models(folder):
    own_tokenizer = tiny.tiny_tokenizer()
    own_tokenizer.add_tokens(["zebra"])
    models = {
        "model": (tiny.tiny_actor(**SIZES), tiny.tiny_tokenizer()),
        "reference": (tiny.tiny_actor(5, **SIZES), tiny.tiny_tokenizer()),
        "reward_model": (tiny.tiny_reward_model(**SIZES), tiny.tiny_tokenizer()),
        "text_reward": (tiny.tiny_reward_model(7, vocab_size=65, **SIZES), own_tokenizer),
    }
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


@pytest.mark.proof
@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_two_processes_wait_and_quantise_as_one_does(tmp_path, engine):
    """Offloaded, with NaN where weights wait, a run is the plain one; in 4 bits it trains, DPO's reference too."""
    save_models(tmp_path)
    measured = two_processes.measured(SCRIPT, tmp_path / "measured.pt", tmp_path, engine, deepspeed=True)
    plain, waiting, quantised = (measured[name] for name in ("plain", "waiting", "4 bits"))
    assert plain["lines"] == waiting["lines"]
    assert plain["gigabytes"] == (0, 0)
    assert min(waiting["gigabytes"]) > 0
    for result, kinds in ((plain, ["Linear"]), (quantised, ["Linear", "Linear4bit"])):
        assert result["layers"] == dict.fromkeys(("reference", "reward_model", "text_reward"), kinds)
    for line, other in zip(plain["lines"], quantised["lines"], strict=True):
        assert all(math.isfinite(value) for value in other.values())
        assert line.get("reward/score", 0.0) != other.get("reward/score", 1.0)  # said once per rollout
    assert measured["dpo"]["layers"] == ["Linear", "Linear4bit"]
    assert all(math.isfinite(loss) for loss in measured["dpo"]["losses"])
