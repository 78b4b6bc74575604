"""What reaches vLLM from two processes, under DDP and under real ZeRO-3: the actor, whole, and not the critic."""

from pathlib import Path

import pytest

import tiny
import two_processes


SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "vllm_layouts.py"


@pytest.mark.proof
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_actor_is_sent_whole_and_the_critic_is_neither_sent_nor_gathered(tmp_path, engine):
    """The engine's log-probabilities are the trainer's in each of three rollouts, colocated and as a server."""
    tiny.save_tiny(tmp_path)
    measured = two_processes.measured(SCRIPT, tmp_path / "measured.pt", tmp_path, engine, deepspeed=True)
    more = {"colocate/lora", "server/full"} if engine == "zero3" else set()
    assert measured.keys() == {"colocate/full", "server/lora"} | more
    for case, result in measured.items():
        assert len(result["differences"]) == 3, case
        assert max(result["differences"]) < 1e-4, case
        # A colocated engine on each process; one server, which the first process talks to.
        assert result["loads"] == ([3, 3] if case.startswith("colocate") else [3, 0]), case
        assert result["partitioned"] == (engine == "zero3"), case
        assert result["gathered"] > 0, case
        assert not result["critic was gathered"], case
