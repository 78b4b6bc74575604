"""Recipes and options become the layout that is run; a run that does not fit stops before anything is loaded."""

import dataclasses
import json
import types
from pathlib import Path

import pytest
import torch
from transformers.training_args import OptimizerNames

import tiny
from commands import command
from trl_ext import DPOConfigX, PPOConfigX, RewardConfigX
from trl_ext.cli import fit, training
from trl_ext.cli.commands.plan import options_of
from trl_ext.cli.fit import require_fit
from trl_ext.cli.launch import LaunchArguments
from trl_ext.cli.models import ModelArguments
from trl_ext.cli.parser import OptionParser
from trl_ext.cli.recipes import find_deepspeed, read_recipe
from trl_ext.packing.budget import cut_by_tokens
from trl_ext.planner import CPU, GIB, GPUS, Hardware, layout_from_options, names_from_options, plan, this_machine
from trl_ext.ppo.config import PPOLoopConfig


pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes and PEFT when they are imported
ROOT = Path(__file__).parents[2]
CONFIGS = {"ppo": PPOConfigX, "dpo": DPOConfigX, "reward": RewardConfigX}
GPU = Hardware(memory=24 * GIB)


def layout_of(path: Path, hardware: Hardware):
    options = options_of(path)
    return names_from_options(options), layout_from_options(path.parent.name, options, hardware)


def parsed_options(path: Path) -> dict:
    """The recipe's options as a run parses them, with every default of its classes."""
    parser = OptionParser("", command(path.parent.name).COMMAND.classes)
    options = {name: action.dest for action in parser._actions for name in action.option_strings}
    given = read_recipe(path).items()
    parser.set_defaults_with_config(**{options[f"--{key}"]: value for key, value in given if f"--{key}" in options})
    values = vars(parser.parse_known_args([])[0])
    return values | {"deepspeed": find_deepspeed(values["deepspeed"])}


def test_recipe_is_planned_as_a_run_reads_it():
    """The planner reads it without TRL's parser, which takes seconds to import."""
    paths = [path for name in CONFIGS for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
    assert len(paths) > 10
    for path in paths:
        parsed = parsed_options(path)
        for hardware in (CPU, GPU):
            layout = layout_from_options(path.parent.name, parsed, hardware)
            assert layout_of(path, hardware) == (names_from_options(parsed), layout)


def test_demo_recipes_fit_the_machines_that_they_name():
    """Their headers say 8 GB and 5 GB of memory; a process that has imported everything holds about 1 GB of it."""
    for name, memory in (("ppo", 8e9), ("dpo", 5e9)):
        names, layout = layout_of(ROOT / "configs" / name / "demo.yaml", CPU)
        assert plan(names, layout.change(prompt=16, response=max(layout.response - 16, 12)), CPU).needed < memory - 1e9


@pytest.mark.parametrize(
    "per_device, accumulation, mini_batches, n", [(4, 1, 1, 1), (4, 6, 2, 1), (6, 4, 3, 1), (3, 2, 6, 1), (3, 4, 1, 4)]
)
def test_batches_are_those_of_the_trainer(tmp_path, per_device, accumulation, mini_batches, n):
    options = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    options |= {"num_mini_batches": mini_batches, "num_ppo_epochs": 3, "num_generations": n}
    args = PPOConfigX(str(tmp_path), use_cpu=True, **options)
    loop = PPOLoopConfig(args)
    layout = layout_from_options("ppo", vars(args), CPU)
    assert layout.rollout == args.local_batch_size
    assert layout.micro_batch == loop.per_device_train_batch_size
    assert layout.accumulation == loop.gradient_accumulation_steps
    assert layout.epochs == 3


def test_defaults_are_those_of_the_configs(tmp_path):
    for name, config in CONFIGS.items():
        # TRL's own config of a reward run asks for bfloat16 on a CPU, too; the command does not.
        args = config(str(tmp_path), use_cpu=True, **({"bf16": False} if name == "reward" else {}))
        assert layout_from_options(name, vars(args), CPU) == layout_from_options(name, {}, CPU)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"critic": "head"}, {"critic": "head"}),
        ({"kl_coef": 0.0}, {"reference": "none"}),
        ({"beta": 0.0}, {"reference": "none"}),
        ({"use_peft": True}, {"method": "lora", "reference": "adapter", "targets": ("q_proj", "v_proj")}),
        ({"use_peft": True, "lora_target_modules": ["all-linear"], "lora_r": 4}, {"targets": "all-linear", "rank": 4}),
        ({"use_peft": True, "lora_target_modules": [r".*\.o_proj"]}, {"targets": r".*\.o_proj"}),
        ({"use_peft": True, "load_in_4bit": True}, {"method": "qlora", "compute": "bf16"}),
        ({"use_peft": True, "dtype": "float32"}, {"compute": "autocast"}),
        ({}, {"method": "full", "compute": "autocast", "reference": "model", "reward": "model"}),
        ({"bf16": False}, {"compute": "fp32"}),
        ({"optim": "paged_adamw_8bit"}, {"optimizer": "paged_adamw_8bit"}),
        ({"optim": OptimizerNames.ADAFACTOR}, {"optimizer": "adafactor"}),
        ({"gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"response_length": 99}, {"response": 99}),
        ({"max_completion_length": 98}, {"response": 98}),
        (
            {"micro_batch_tokens": 3000, "response_length": 88, "gradient_accumulation_steps": 2},
            {"micro_batch": 5, "accumulation": 4, "micro_batch_tokens": 3000},
        ),
        ({"micro_batch_tokens": 10**6}, {"micro_batch": 8, "accumulation": 1, "micro_batch_tokens": 8 * 565}),
        ({"score_batch_tokens": 6000, "response_length": 88}, {"score_batch": 10, "score_batch_tokens": 6000}),
        ({"score_batch_tokens": 400}, {"prompt": 347}),
        ({"offload_frozen_models": True}, {"offload_frozen": True}),
        (
            {"reward_model_quantization": "8bit", "ref_model_quantization": "4bit"},
            {"reward_bits": 8, "reference_bits": 4},
        ),
        ({"use_vllm": True, "vllm_mode": "colocate"}, {"vllm_share": 0.3}),
        ({"use_vllm": True, "vllm_mode": "server"}, {"vllm_share": 0.0}),
        ({"ds3_gather_for_generation": False}, {"gather_for_generation": False}),
    ],
)
def test_option_of_ppo_reaches_the_layout(options, expected):
    layout = layout_from_options("ppo", options, GPU)
    assert {name: getattr(layout, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"reference": "model", "prompt": 512, "response": 512}),
        ({"precompute_ref_log_probs": True}, {"reference": "none"}),
        ({"use_peft": True}, {"reference": "adapter"}),
        ({"packing": False}, {"share_prefixes": False}),
        ({"max_length": 2048, "per_device_train_batch_size": 2}, {"response": 1024, "micro_batch": 2}),
    ],
)
def test_option_of_dpo_reaches_the_layout(options, expected):
    layout = layout_from_options("dpo", options, GPU)
    assert {name: getattr(layout, name) for name in expected} == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, {"critic": "none", "reward": "none", "reference": "none", "prompt": 512, "response": 512}),
        ({"use_peft": True}, {"method": "lora", "reference": "none"}),
        ({"packing": False, "max_length": 64}, {"share_prefixes": False, "response": 32}),
    ],
)
def test_option_of_a_reward_run_reaches_the_layout(options, expected):
    layout = layout_from_options("reward", options, GPU)
    assert {name: getattr(layout, name) for name in expected} == expected


def test_budget_of_tokens_counts_the_answers_of_short_prompts():
    """Parts of a budget hold more answers where prompts are short than sequences of the longest prompt."""
    options = {"micro_batch_tokens": 3000, "response_length": 400, "per_device_train_batch_size": 64}
    layout = layout_from_options("ppo", options, GPU, prompt=600)
    for prompts in ([600] * 64, [20] * 64, [20, 600, 300, 60] * 16, [1] * 64):
        parts = cut_by_tokens(prompts, [400] * 64, 3000, True, [[i] for i in range(64)])
        assert max(400 * len(part) for part in parts) <= layout.scored_tokens
        assert max(sum(prompts[i] + 400 for i in part) for part in parts) <= layout.learned_tokens
    assert layout.scored_tokens == 3000 > layout.micro_batch * layout.response
    scoring = layout_from_options("ppo", {"score_batch_tokens": 3000, "response_length": 400} | options, GPU, 600)
    assert scoring.scoring == (3000, 3000)
    few = layout_from_options("ppo", options | {"per_device_train_batch_size": 2}, GPU, prompt=600)
    assert (few.learned_tokens, few.scored_tokens) == (2000, 800)


def test_prompt_as_long_as_a_pair_is_an_error():
    with pytest.raises(ValueError, match="leaves no room for an answer in `max_length=64`"):
        layout_from_options("dpo", {"max_length": 64}, GPU, prompt=64)


def test_deepspeed_file_reaches_the_layout(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    zero |= {"reduce_bucket_size": "auto", "stage3_max_live_parameters": 6e8}
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    layout = layout_from_options("ppo", {"deepspeed": str(file), "model_name_or_path": "33b"}, GPU)
    assert (layout.zero_stage, layout.offload_optimizer, layout.offload_parameters) == (3, True, True)
    assert (layout.reduce_bucket, layout.live_parameters, layout.compute) == (6656**2, 6e8, "bf16")
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}))
    layout = layout_from_options("ppo", {"deepspeed": str(file), "bf16": False}, GPU)
    assert (layout.zero_stage, layout.offload_optimizer, layout.compute) == (2, False, "fp32")


def test_deepspeed_of_accelerate_launch_reaches_the_layout():
    """accelerate's own file leaves `deepspeed` unset; the Trainer's options then hold its plugin."""
    plugin = types.SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    layout = layout_from_options("ppo", {"deepspeed": None, "deepspeed_plugin": plugin}, GPU)
    assert (layout.zero_stage, layout.compute) == (3, "bf16")


def test_fsdp_of_options_and_launcher_reaches_the_layout(monkeypatch):
    assert not layout_from_options("ppo", {}, GPU).fsdp
    assert layout_from_options("ppo", {"fsdp": True}, GPU).fsdp
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    layout = layout_from_options("ppo", {}, GPU)
    assert (layout.fsdp, layout.zero_stage, layout.compute) == (True, 0, "autocast")


def test_reward_adapter_shares_the_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    options = {"use_peft": True, "load_in_4bit": True, "reward_model_path": str(tmp_path)}
    assert layout_from_options("ppo", options, GPU).reward == "adapter"
    # One that is still to be trained, in a recipe whose critic is an adapter
    options |= {"reward_model_path": str(tmp_path / "later"), "critic": "adapter"}
    assert layout_from_options("ppo", options, GPU).reward == "adapter"
    assert layout_from_options("ppo", options | {"critic": "head"}, GPU).reward == "model"


def test_names_are_those_that_the_scripts_load(tmp_path):
    assert names_from_options({}).actor == "smollm2-135m-instruct"
    assert names_from_options({"sft_model_path": "x/y"}).actor == "x/y"
    assert names_from_options({"model_name_or_path": "a/b", "reward_model_path": "c/d"}).reward == "c/d"
    # The reward model of a recipe that is still to be trained has the actor's sizes.
    assert names_from_options({"reward_model_path": str(tmp_path / "later")}).reward is None
    tiny.tiny_config().save_pretrained(tmp_path)
    assert names_from_options({"reward_model_path": str(tmp_path)}).reward == str(tmp_path)


def test_this_machine_is_a_cpu_with_memory():
    machine = this_machine()
    assert machine.is_cpu
    assert machine.gpus == 1
    assert machine.memory > GIB


def test_this_machine_with_a_gpu_is_that_gpu(monkeypatch):
    """A stand-in for the driver: name and memory are the device's, the number of GPUs the launch's."""
    device = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    machine = this_machine()
    assert (machine.memory, machine.gpus, machine.nodes, machine.is_cpu) == (79 * GIB, 16, 2, False)
    assert machine.flops == GPUS["h100-80gb"]["flops"]


# ---- Before loading


def arguments(tmp_path, **options):
    config = PPOConfigX(str(tmp_path), bf16=False, **options)
    return ModelArguments(model_name_or_path="8b"), LaunchArguments(), config


def test_run_that_does_not_fit_stops_with_the_plan(tmp_path):
    model, asked, config = arguments(tmp_path)
    with pytest.raises(SystemExit, match="It does not fit") as stopped:
        require_fit("ppo", model, asked, config, hardware=GPU)
    message = str(stopped.value)
    assert "| **learn**" in message
    assert "The smallest change that makes it fit" in message or "It fits with these changes together" in message
    assert "Prompts of 512 tokens are assumed." in message
    assert message.endswith("`--force` trains all the same.")


def test_what_goes_on(tmp_path, monkeypatch):
    """With `--force`, what fits, a model that the planner cannot read, and, without a GPU, anything."""
    model, asked, config = arguments(tmp_path)
    require_fit("ppo", model, dataclasses.replace(asked, force=True), config, hardware=GPU)
    require_fit("ppo", model, asked, config, hardware=dataclasses.replace(GPU, memory=4000 * GIB))
    require_fit("ppo", ModelArguments(model_name_or_path="no/such-model"), asked, config, hardware=GPU)
    monkeypatch.setattr(fit, "this_machine", lambda: pytest.fail("looked for a GPU"))
    require_fit("ppo", model, asked, config)
    assert not torch.cuda.is_available()


def test_visible_gpus_are_what_it_is_to_fit(tmp_path, monkeypatch):
    model, asked, config = arguments(tmp_path)
    monkeypatch.setattr(fit, "this_machine", lambda: GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match=r"of 24\.0 GiB"):
        require_fit("ppo", model, asked, config)
    require_fit("ppo", model, asked, PPOConfigX(str(tmp_path), use_cpu=True, bf16=False))


@pytest.mark.parametrize("error", [RuntimeError("per layer"), KeyError("head_dim"), ValueError("no such model")])
def test_planner_that_cannot_plan_ends_no_run(error, tmp_path, monkeypatch, capsys):
    def cannot(*_):
        raise error

    monkeypatch.setattr(fit, "plan_run", cannot)
    model, asked, config = arguments(tmp_path)
    require_fit("ppo", model, asked, config, hardware=GPU)
    assert f"Whether the run fits has not been planned: {error}" in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_script_asks_before_it_builds(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training.TrainingCommand, "build", lambda *_: pytest.fail("built before it was asked"))
    monkeypatch.setattr(training, "require_fit", lambda *given: require_fit(*given, hardware=GPU))
    flags = ["--model", "33b", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="It does not fit"):
        command(name).main(flags)
    with pytest.raises(pytest.fail.Exception, match="built before"):
        command(name).main([*flags, "--force"])
