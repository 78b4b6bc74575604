"""The `vllm serve` that `trl-ext serve` prints and starts; tests/ppo/test_vllm_engine.py has one that serves."""

import os
import shlex

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from cli_runs import error_of
from trl_ext.cli.main import main


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def served(paths, recipe, capsys):
    """The words of the command for a recipe with these options, and these words behind its name."""

    def words(*behind, **options):
        options = {"model": paths["actor"], "use_cpu": True} | options
        main(["serve", recipe("\n".join(f"{name}: {value}" for name, value in options.items())), *behind, "--dry_run"])
        return shlex.split(capsys.readouterr().out)

    return words


def flags_of(words):
    """The flags of the command, by name."""
    assert words[:3] == ["VLLM_SERVER_DEV_MODE=1", "vllm", "serve"]
    return dict(zip(words[4::2], words[5::2], strict=True))


ALWAYS = {"--weight-transfer-config": '{"backend": "nccl"}', "--logprobs-mode": "processed_logprobs"}
HERE = {"--host": "127.0.0.1", "--port": "8000"}


@pytest.mark.parametrize(
    "options, flags",
    [
        ({}, {"--dtype": "float32"} | HERE),
        ({"dtype": "bfloat16"}, {"--dtype": "bfloat16"} | HERE),
        ({"bf16": True}, {"--dtype": "bfloat16"} | HERE),
        (
            {"vllm_server_host": "10.0.0.7", "vllm_server_port": 81},
            {"--dtype": "float32", "--host": "10.0.0.7", "--port": "81"},
        ),
        (
            {"vllm_server_base_url": "http://gpu-box:9000/"},
            {"--dtype": "float32", "--host": "gpu-box", "--port": "9000"},
        ),
        ({"vllm_max_model_length": 99}, {"--dtype": "float32", "--max-model-len": "99"} | HERE),
        ({"vllm_tensor_parallel_size": 2}, {"--dtype": "float32", "--tensor-parallel-size": "2"} | HERE),
        ({"model_revision": "v2"}, {"--dtype": "float32", "--revision": "v2"} | HERE),
    ],
    ids=str,
)
def test_server_is_that_of_the_recipe(served, paths, options, flags):
    words = served(**options)
    assert words[3] == paths["actor"]
    assert flags_of(words) == flags | ALWAYS


def test_flags_of_ppo_override_the_recipe_and_those_of_vllm_come_last(paths, recipe, capsys):
    written = recipe(f"model: {paths['actor']}\nuse_cpu: true\nvllm_server_port: 8001\n")
    main(["serve", written, "--vllm_server_port", "8002", "--dry-run", "--", "--port", "8003", "--dry_run"])
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index("--port") + 1] == "8002"
    assert words[-3:] == ["--port", "8003", "--dry_run"]


def test_adapter_is_served_by_its_base(served, paths, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(paths["actor"])
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    assert served(model=tmp_path / "adapter")[3] == paths["actor"]


def test_server_is_started_with_the_printed_flags(paths, recipe, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr("trl.generation.vllm_generation.is_vllm_available", lambda: True)
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    main(["serve", recipe(f"model: {paths['actor']}\nuse_cpu: true\n"), "--", "--seed", "3"])
    printed = shlex.split(capsys.readouterr().out)
    ((_, *words),) = started
    assert words == ["-m", "vllm.entrypoints.openai.api_server", "--model", *printed[3:]]
    assert os.environ["VLLM_SERVER_DEV_MODE"] == "1"


@pytest.mark.parametrize(
    "behind, said",
    [
        ([], "error: `use_vllm` needs vLLM, which is not installed"),
        (["--kl_coeff", "1", "--dry_run"], "there is no option `--kl_coeff`"),
        (["--model", "nowhere/x/y", "--dry_run"], "nowhere/x/y"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(paths, recipe, capsys, behind, said):
    assert said in error_of(["serve", recipe(f"model: {paths['actor']}\nuse_cpu: true\n"), *behind], capsys)


def test_recipe_that_is_not_there_is_named(capsys):
    assert "There is no file 'ppo/dmeo'" in error_of(["serve", "ppo/dmeo", "--dry_run"], capsys)
