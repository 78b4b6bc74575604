"""The files in configs/accelerate and configs/deepspeed, as their readers read them, and what contradicts them."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainingArguments

import dpo_runs
import ppo_runs
import tiny
from accelerate_files import ACCELERATE, launch
from trl_ext.models import sharding
from two_processes import ROOT
from zero_runs import BUILD, launched, save


DEEPSPEED = ROOT / "configs" / "deepspeed"
# accelerate and DeepSpeed import half of their optional dependencies.
pytestmark = pytest.mark.filterwarnings("ignore")

# File: DeepSpeed stage, and where optimizer and parameters rest.
LAYOUTS = {
    "zero1": (1, None, None),
    "zero2": (2, None, None),
    "zero3": (3, None, None),
    "zero3_offload": (3, "cpu", "cpu"),
    "ppo_33b_4x80g": (3, "cpu", "cpu"),
    "dpo_33b_2x80g": (3, "cpu", None),
}
# File: processes on each machine, machines, DeepSpeed file.
LAUNCHES = {
    "ddp": (8, 1, None),
    "fsdp2": (8, 1, None),
    "zero2": (8, 1, "zero2"),
    "zero3": (8, 1, "zero3"),
    "zero3_offload": (8, 1, "zero3_offload"),
    "zero3_2nodes": (8, 2, "zero3"),
    "zero3_4nodes": (8, 4, "zero3"),
}
FILLED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def read(name):
    return json.loads((DEEPSPEED / f"{name}.json").read_text())


def test_every_file_is_named_here():
    assert {path.stem for path in DEEPSPEED.iterdir()} == LAYOUTS.keys()
    assert {path.stem for path in ACCELERATE.iterdir()} == {*LAUNCHES, "single"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_deepspeed_file_is_its_layout_and_leaves_the_options_to_the_trainer(name):
    config = read(name)
    assert [config[field] for field in FILLED] == ["auto"] * len(FILLED)
    assert config["bf16"] == config["fp16"] == {"enabled": "auto"}
    assert "optimizer" not in config  # of the options, one for actor and critic with their learning rates
    known = DeepSpeedZeroConfig(**config["zero_optimization"])
    fields = DeepSpeedZeroConfig.model_fields.items()
    assert config["zero_optimization"].keys() <= {field.alias or name for name, field in fields}
    stage, optimizer, parameters = LAYOUTS[name]
    offloads = (known.offload_optimizer, known.offload_param)
    assert (known.stage, *(where and where.device for where in offloads)) == (stage, optimizer, parameters)
    if stage == 3:
        assert known.gather_16bit_weights_on_model_save, "what is saved must load with from_pretrained"


@pytest.mark.parametrize("name", LAUNCHES)
def test_accelerate_file_starts_what_it_says(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    processes, machines, deepspeed = LAUNCHES[name]
    started = launch(ACCELERATE / f"{name}.yaml")
    assert (started.processes, started.machines) == (processes, machines)
    assert started.environment.get("ACCELERATE_USE_DEEPSPEED") == (deepspeed and "true")
    assert started.environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") == (
        deepspeed and f"configs/deepspeed/{deepspeed}.json"
    )
    assert started.environment["ACCELERATE_MIXED_PRECISION"] == "no", "`bf16` of the options decides"
    if machines > 1:
        assert started.options["rdzv_endpoint"] == "10.0.0.1:29500"


@pytest.mark.parametrize("name", ["zero3_2nodes", "zero3_4nodes"])
def test_processes_of_several_machines_are_those_of_one(name, monkeypatch):
    """What each is told, but for the machines; so the proof of layouts runs those of one."""
    monkeypatch.chdir(ROOT)
    one = launch(ACCELERATE / "zero3.yaml", "--num_processes", "2").environment
    each = launch(ACCELERATE / f"{name}.yaml", "--num_machines", "1", "--num_processes", "2").environment
    fields = {"deepspeed_config_file", "deepspeed_multinode_launcher", "zero3_init_flag"}
    assert set(each.pop("ACCELERATE_CONFIG_DS_FIELDS").split(",")) == fields
    assert each == {key: value for key, value in one.items() if key != "ACCELERATE_CONFIG_DS_FIELDS"}


def test_single_starts_one_process():
    config = yaml.safe_load((ACCELERATE / "single.yaml").read_text())
    assert (config["distributed_type"], config["num_processes"], config["num_machines"]) == ("NO", 1, 1)


def test_33b_files_keep_room_for_a_layer_of_llama_33b():
    """What ZeRO-3 may hold gathered at a time is more than one layer: 4 H² of attention, 3 H·I of the MLP."""
    layer = 4 * 6656**2 + 3 * 6656 * 17920
    for name in ("ppo_33b_4x80g", "dpo_33b_2x80g"):
        assert layer < read(name)["zero_optimization"]["stage3_max_live_parameters"] < 2 * layer


# --- what FSDP cannot do


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
REFUSED = {
    "FSDP of version 1 is not supported": ({"FSDP_VERSION": "1"}, {}),
    "`state_dict_type` SHARDED_STATE_DICT the run would end": ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}),
    "`quantization_config` asks for .* FSDP has not been tried": ({}, {"quantization_config": BitsAndBytesConfig()}),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("algorithm", BUILD)
def test_what_fsdp_cannot_do_is_refused_before_a_model_loads(saved, tmp_path, monkeypatch, algorithm, message):
    environment, models = REFUSED[message]
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(lambda *args, **kwargs: pytest.fail("loaded")))
    with launched(FSDP | environment), pytest.raises(ValueError, match=message):
        BUILD[algorithm](saved, tmp_path, models, max_steps=1)


def test_quantized_model_among_reward_funcs_is_refused_under_fsdp(saved, tmp_path):
    """By the config of its folder."""
    model = tmp_path / "model"
    shutil.copytree(saved / "reward_model", model)
    config = json.loads((model / "config.json").read_text())
    quantized = config | {"quantization_config": BitsAndBytesConfig(load_in_4bit=True).to_dict()}
    (model / "config.json").write_text(json.dumps(quantized))
    models = {"reward_funcs": [lambda completions, **kwargs: [0.0] * len(completions), str(model)]}
    with launched(FSDP), pytest.raises(ValueError, match=r"`reward_funcs\[1\]` asks for .* FSDP has not been tried"):
        BUILD["ppo"](saved, tmp_path, models, max_steps=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save(folder)
    return folder


# --- what contradicts the options


@pytest.fixture(autouse=True)
def _no_file_stays_in_force():
    with launched({}):
        yield


@pytest.fixture
def deepspeed_file(tmp_path):
    def write(**fields):
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(read("zero2") | fields))
        return str(path)

    return write


SIZES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_mini_batches": 2}
# Stage, where the optimizer's states are, the version of DeepSpeed, and whether it refuses budgets of tokens.
OFFLOADING = [
    (2, "cpu", "0.18.9", True),
    (1, "cpu", "0.18.9", True),
    (2, "cpu", "0.19.0", False),
    (2, "none", "0.18.9", False),
    (3, "cpu", "0.18.9", False),
]


@pytest.mark.parametrize(
    "field, right",
    [("train_micro_batch_size_per_gpu", 2), ("gradient_accumulation_steps", 2), ("train_batch_size", 4)],
)
def test_ppo_batch_field_must_be_what_an_optimizer_step_takes(tmp_path, deepspeed_file, field, right):
    """8 responses of a rollout in 2 mini-batches: 2 micro-batches of 2 per step, though the option says 4."""
    args = ppo_runs.ppo_config(tmp_path, deepspeed=deepspeed_file(**{field: right}), **SIZES)
    assert args.deepspeed_plugin.hf_ds_config.config[field] == right
    message = (
        rf"DeepSpeed file has {field}=8, and the options make {field}={right}: 2 at a time, 2 times .*8 responses of"
    )
    with pytest.raises(ValueError, match=message):
        ppo_runs.ppo_config(tmp_path, deepspeed=deepspeed_file(**{field: 8}), **SIZES)


def test_auto_is_filled_with_what_an_optimizer_step_takes(tmp_path, deepspeed_file):
    filled = ppo_runs.ppo_config(tmp_path, deepspeed=deepspeed_file(), **SIZES).deepspeed_plugin.hf_ds_config.config
    fields = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    assert [filled[field] for field in fields] == [2, 2, 4]


@pytest.mark.parametrize("stage, device, installed, refused", OFFLOADING)
def test_budget_needs_a_deepspeed_that_keeps_the_gradients_of_every_pass(
    tmp_path, deepspeed_file, monkeypatch, stage, device, installed, refused
):
    """0.18.6 lost 61% of the gradient norm of a step with four passes."""
    monkeypatch.setattr(sharding, "version", lambda package: installed)
    path = deepspeed_file(zero_optimization={"stage": stage, "offload_optimizer": {"device": device}})
    options = SIZES | {"deepspeed": path}
    ppo_runs.ppo_config(tmp_path, **options)
    with pytest.raises(ValueError, match=r"DeepSpeed 0\.18\.9 would learn") if refused else nullcontext():
        ppo_runs.ppo_config(tmp_path, micro_batch_tokens=64, **options)


def test_dpo_batch_field_must_agree_with_the_options(tmp_path, deepspeed_file):
    message = 'train_batch_size=12, and the options make train_batch_size=4: 4 at a time, 1 times .*Write "auto"'
    with pytest.raises(ValueError, match=message):
        dpo_runs.dpo_config(tmp_path, deepspeed=deepspeed_file(train_batch_size=12), use_cpu=False)


def test_a_field_that_is_missing_counts_as_one(tmp_path, deepspeed_file):
    path = Path(deepspeed_file())
    config = json.loads(path.read_text())
    del config["gradient_accumulation_steps"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=1, .*one that is missing counts as 1"):
        ppo_runs.ppo_config(tmp_path, deepspeed=str(path), **SIZES)


def test_world_size_that_does_not_divide_the_batch_is_named(tmp_path, deepspeed_file, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 3)
    with pytest.raises(ValueError, match=r"on 3 processes\. 3 processes do not divide 16\."):
        ppo_runs.ppo_config(tmp_path, deepspeed=deepspeed_file(train_batch_size=16), **SIZES)


def test_optimizer_of_the_file_would_lose_the_critics_learning_rate(tmp_path, deepspeed_file):
    path = deepspeed_file(optimizer={"type": "AdamW", "params": {"lr": "auto"}})
    ppo_runs.ppo_config(tmp_path, deepspeed=path)
    with pytest.raises(ValueError, match=r"`optimizer` of its own, which would ignore \['critic_learning_rate'\]"):
        ppo_runs.ppo_config(tmp_path, deepspeed=path, critic_learning_rate=1e-3)


# What launches, options of the critic, and what is said of them.
ENGINES = [
    ("zero2", {"critic_max_grad_norm": 1.0}, "`critic_max_grad_norm=1.0` with DeepSpeed, which clips"),
    ("zero3", {"critic_max_grad_norm": 1.0}, "`critic_max_grad_norm=1.0` with DeepSpeed, which clips"),
    ("zero2", {"critic_steps": 2}, None),
    ("fsdp", {"critic_max_grad_norm": 1.0}, "`critic_max_grad_norm=1.0` with FSDP, which clips"),
    ("fsdp", {"critic_steps": 2}, "`critic_steps=2` with FSDP, where the critic has no steps"),
    ("fsdp", {"critic_warmup_steps": 1}, None),
    ("one process", {"critic_max_grad_norm": 1.0, "critic_steps": 2}, None),
]


@pytest.mark.parametrize("engine, options, said", ENGINES)
def test_options_of_the_critic_that_an_engine_cannot_follow_are_refused(tmp_path, monkeypatch, engine, options, said):
    if engine == "fsdp":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as accelerate's launcher does
    elif engine.startswith("zero"):
        options = options | {"deepspeed": str(DEEPSPEED / f"{engine}.json")}
    with pytest.raises(ValueError, match=said) if said else nullcontext():
        ppo_runs.ppo_config(tmp_path, **options)


@pytest.mark.parametrize("role", ["model", "value_model"])
def test_quantized_model_is_refused_under_zero3_before_it_is_loaded(tmp_path, role):
    quantized = tmp_path / "quantized"
    in_4bit = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    kind = "LlamaForCausalLM" if role == "model" else "LlamaForSequenceClassification"
    config = tiny.tiny_config(architectures=[kind], num_labels=1, quantization_config=in_4bit)
    config.save_pretrained(quantized)
    models = {"model": tiny.tiny_actor(), "reward_model": tiny.tiny_reward_model()} | {role: str(quantized)}
    args = ppo_runs.ppo_config(tmp_path, deepspeed=str(DEEPSPEED / "zero3.json"))
    with pytest.raises(ValueError, match=f"`{role}` asks for a quantized model, and ZeRO-3 .* Train an adapter"):
        ppo_runs.PPOTrainerX(args, processing_class=tiny.tiny_tokenizer(), train_dataset=tiny.tiny_prompts(), **models)


def test_tools_need_the_gathered_weights(tmp_path):
    """Processes take different numbers of turns."""

    def tool(number: int) -> int:
        """Doubles a number.

        Args:
            number: to double.
        """
        return 2 * number

    models = {"model": tiny.tiny_actor(), "reward_model": tiny.tiny_reward_model(), "tools": [tool]}
    zero3 = {"deepspeed": str(DEEPSPEED / "zero3.json"), "ds3_gather_for_generation": False}
    args = ppo_runs.ppo_config(tmp_path, **zero3)
    with pytest.raises(ValueError, match="With tools, the processes generate different numbers of turns"):
        ppo_runs.PPOTrainerX(args, processing_class=tiny.tiny_tokenizer(), train_dataset=tiny.tiny_prompts(), **models)


def test_quantization_config_is_refused_under_zero3(tmp_path):
    models = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "model": str(tmp_path)}
    args = {"deepspeed": str(DEEPSPEED / "zero3.json"), "use_cpu": False}
    with pytest.raises(ValueError, match="`quantization_config` asks for a quantized model, and ZeRO-3"):
        dpo_runs.dpo_trainer(tmp_path, models | {"model": tiny.tiny_actor()}, **args)
