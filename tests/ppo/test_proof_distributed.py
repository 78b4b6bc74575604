"""PPO on two processes: four roles, what reaches vLLM, and frozen models that wait or have 4 bits."""

import math

import pytest

import four_roles
import proof_runs
import two_processes


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    proof_runs.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def measured(folder):
    return two_processes.measured(proof_runs.measure, folder, timeout=900)


@pytest.mark.parametrize("case", four_roles.CASES)
def test_four_roles_train_as_in_one_process(measured, folder, monkeypatch, case):
    """DDP, on a 4-bit base and with gradient checkpointing: the losses and adapters of one process."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    two = measured["four roles"][case]
    one = four_roles.run(four_roles.paths_in(folder / "roles"), 8, 1, **four_roles.CASES[case])
    assert two["parameters"].keys() == one["parameters"].keys()
    for name, parameter in one["parameters"].items():
        assert (two["parameters"][name] - parameter).norm() < 1e-5 * parameter.norm(), name
    for mine, theirs in zip(two["lines"], one["lines"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_actor_is_sent_whole_to_vllm_and_the_critic_is_neither_sent_nor_gathered(measured, engine):
    """The engine's log-probabilities are the trainer's in each of three rollouts, colocated and as a server."""
    results = measured[f"vllm, {engine}"]
    more = {"colocate/lora", "server/full"} if engine == "zero3" else set()
    assert results.keys() == {"colocate/full", "server/lora"} | more
    for case, result in results.items():
        assert len(result["differences"]) == 3, case
        assert max(result["differences"]) < 1e-4, case
        # A colocated engine on each process; one server, which the first process talks to.
        assert result["loads"] == ([3, 3] if case.startswith("colocate") else [3, 0]), case
        assert result["partitioned"] == (engine == "zero3"), case
        assert result["gathered"] > 0, case
        assert not result["critic was gathered"], case


@pytest.mark.parametrize("engine", ["ddp", "zero2"])
def test_frozen_models_wait_and_are_quantised_as_in_one_process(measured, engine):
    """Offloaded, with NaN where weights wait, a run is the plain one; in 4 bits it trains, DPO's reference too."""
    results = measured[f"frozen, {engine}"]
    plain, waiting, quantised = (results[name] for name in ("plain", "waiting", "4 bits"))
    assert plain["lines"] == waiting["lines"]
    assert plain["gigabytes"] == (0, 0)
    assert min(waiting["gigabytes"]) > 0
    for result, kinds in ((plain, ["Linear"]), (quantised, ["Linear", "Linear4bit"])):
        assert result["layers"] == dict.fromkeys(("reference", "reward_model", "text_reward"), kinds)
    for line, other in zip(plain["lines"], quantised["lines"], strict=True):
        assert all(math.isfinite(value) for value in other.values())
        assert line.get("reward/score", 0.0) != other.get("reward/score", 1.0)  # said once per rollout
    assert results["dpo"]["layers"] == ["Linear", "Linear4bit"]
    assert all(math.isfinite(loss) for loss in results["dpo"]["losses"])
