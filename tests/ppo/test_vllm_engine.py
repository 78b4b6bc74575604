"""
A real vLLM on the CPU, colocated and as a server, which `trl-ext serve` starts: `make test-vllm`. Here, as there, the
trainer and TRL's side of vLLM are what users have; `tests/helpers/vllm_cpu.py` has the exceptions.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

import tiny
import vllm_rows


pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "tests" / "helpers" / "vllm_runs.py"
EQUAL = 1e-4  # nats, in float32
SMALLEST_OF_CONTROLS = 1e-2  # a hundred times that
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def environment(**settings):
    search = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])
    cpu = {"PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | cpu | vllm_rows.ENVIRONMENT | settings


def measured(group, folder, *launch, **settings):
    """What the cases of a group of `vllm_runs.py` have measured."""
    command = [sys.executable, *launch, str(RUNS), group, str(folder)]
    log = folder / f"{group}.log"
    with log.open("w") as file:
        ended = subprocess.run(command, env=environment(**settings), cwd=folder, stdout=file, stderr=file, timeout=600)
    assert ended.returncode == 0, f"{' '.join(command)}\n{log.read_text()[-6000:]}"
    return json.loads((folder / f"{group}.json").read_text())


@contextmanager
def serving(folder, port, **settings):
    """The address of a server that `trl-ext serve` has started with the tied model."""
    recipe = folder / "served.yaml"
    options = {"model": str(folder / "tied" / "actor"), "output_dir": str(folder / "out"), "vllm_server_port": port}
    options |= {"vllm_max_model_length": 100}
    recipe.write_text(json.dumps(options | {"use_vllm": True, "vllm_mode": "server", "use_cpu": True, "bf16": False}))
    command = [sys.executable, "-m", "trl_ext.cli", "serve", str(recipe), "--", *vllm_rows.SERVER_FLAGS]
    log, url = folder / f"server-{port}.log", f"http://127.0.0.1:{port}"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(**settings), cwd=folder, stdout=file, stderr=file)
    try:
        until = time.monotonic() + 240
        while not is_up(url):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def is_up(url):
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    prepare = f"import vllm_runs, pathlib; vllm_runs.prepare(pathlib.Path({str(folder)!r}))"
    subprocess.run([sys.executable, "-c", prepare], env=environment(), check=True)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """What every group has measured; the table of docs/vllm.md is made of it."""
    results = {"colocated": measured("colocated", folder)}
    with serving(folder, 8731) as url:
        results["server"] = measured("server", folder, SERVER=url)
        results["two"] = measured("two", folder, *TWO_PROCESSES, SERVER=url)
    with serving(folder, 8732, **{vllm_rows.PACKS: "1"}) as url:
        results["packed"] = measured("packed", folder, SERVER=url)
    vllm_rows.MEASURED.parent.mkdir(exist_ok=True)
    vllm_rows.MEASURED.write_text(json.dumps(results, indent=1))
    return results


# --- the numbers


@pytest.mark.parametrize("row", vllm_rows.ROWS, ids=lambda row: f"{row.group}: {row.text}")
def test_engine_gives_the_log_probabilities_of_the_trainer_and_the_control_shows(results, row):
    measured = row.difference(results)
    assert measured < row.at_most, row
    if row.control is not None:
        assert row.of_control(results) > SMALLEST_OF_CONTROLS, row


@pytest.mark.parametrize("group", ["colocated", "server", "two"])
def test_every_rollout_has_its_own_difference_and_both_roles_learn(results, group):
    runs = {name: result for name, result in results[group].items() if "learned" in result}
    assert runs
    for name, result in runs.items():
        assert len(result["differences"]) == 3, name
        assert result["learned"] == ["actor", "critic"], name


def test_control_weights_that_are_sent_once_are_right_in_the_first_rollout_only(results):
    for group in ("colocated", "server"):
        first, *later = results[group]["sent once"]["differences"]
        assert first < EQUAL
        assert min(later) > SMALLEST_OF_CONTROLS


# --- the rest


def test_control_critic_that_is_sent_is_an_error(results):
    assert "critic" in results["colocated"]["with the critic"]["error"]


@pytest.mark.parametrize("group", ["colocated", "server"])
def test_several_responses_to_a_prompt_in_training_and_evaluation(results, group):
    said = results[group]["several"]
    assert said["groups"] == [[0, 1], [2, 3]]
    assert said["evaluations"] == 2
    assert said["answers differ"]


@pytest.mark.parametrize("group", ["colocated", "server"])
def test_runs_go_on_with_their_own_weights(results, group):
    """A second `train()` and a resumed run, for whose steps the engine has other weights."""
    assert len(results[group]["again"]["differences"]) == 5
    assert len(results[group]["resumed"]["differences"]) == 2


def test_rollouts_asked_ahead_are_as_old_as_the_option_says(results):
    assert results["server"]["rollout_lag=1"]["lags"] == [0, 1, 1, 1]
    assert results["server"]["rollout_lag=2"]["lags"] == [0, 1, 2, 2]


@pytest.mark.parametrize("group", ["colocated", "server"])
def test_responses_end_where_they_end_without_vllm(results, group):
    for name in ("declared", "chosen"):
        said = results[group]["ends"][name]
        assert said["ends"]
        assert said["inside"] == 0
        assert said["has_eos"] == said["ended"]
        assert any(said["ended"])
        assert all(ended or length == 60 for ended, length in zip(said["ended"], said["lengths"], strict=True))
    assert tiny.VOCABULARY.index("<eos>") in results[group]["ends"]["chosen"]["tokens"]  # a token like others


def test_engine_computes_as_the_trainer_does(results):
    said = results["colocated"]["precision"]
    assert said["engines"] == {"float32": "torch.float32", "bfloat16": "torch.bfloat16", "autocast": "torch.bfloat16"}


def test_server_that_does_not_fit_is_refused_before_a_model_is_loaded(results):
    said = results["server"]["refused"]
    assert "has another model" in said["model"]
    assert "hidden_size is 64 there and 128 here" in said["model"]
    assert "computes in float32 and the run in bfloat16" in said["dtype"]
    assert "takes 100 tokens" in said["length"]
    assert "vllm_group_port" in said["port"]
