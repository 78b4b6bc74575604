"""Numbers, packages and folders that no run can start with: one sentence, before a model is loaded."""

import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model

import tiny
from dpo_runs import dpo_config, dpo_trainer, tiny_pairs
from ppo_runs import ppo_config
from reward_runs import reward_trainer
from trl_ext import DPOTrainerX, PPOTrainerX, RewardConfigX, RewardTrainerX
from trl_ext.runs import requirements
from trl_ext.runs.requirements import check_startable, make_folder, require_writable


CONFIGS = {"dpo": dpo_config, "ppo": ppo_config, "reward": lambda folder, **options: RewardConfigX(folder, **options)}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"per_device_train_batch_size": -4},
            "`per_device_train_batch_size` is -4; it must be an integer of at least",
        ),
        ({"per_device_eval_batch_size": 0}, "`per_device_eval_batch_size` is 0; it must"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` is 0; it must"),
        ({"gradient_accumulation_steps": 1.5}, "`gradient_accumulation_steps` is 1.5; it must"),
        ({"learning_rate": -1e-5}, "`learning_rate` is -1e-05; it must be 0 or above"),
        ({"learning_rate": "1e-5"}, "`learning_rate` is '1e-5'; it must be 0 or above"),
        ({"learning_rate": math.inf}, "`learning_rate` is inf; it must be 0 or above, and finite"),
        ({"num_train_epochs": 0}, "`num_train_epochs` is 0; it must be above 0"),
        ({"max_steps": -5}, "`max_steps` is -5; it must be an integer of at least 1, or -1"),
        ({"max_steps": 0}, "`max_steps` is 0; it must"),
        ({"save_total_limit": 0}, "`save_total_limit` is 0; it must be an integer of at least 1, such as 2, or unset"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` is -1.0; it must be 0 or above; 0 does not clip"),
        ({"seed": 2**32}, "`seed` is 4294967296; it must"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1; .* DPO has `label_smoothing`"),
        ({"fp16": True}, "`fp16` needs a GPU: on a CPU accelerate leaves it off"),
        ({"report_to": "wandbb"}, "`report_to` has 'wandbb'; it may have .*wandb"),
        ({"report_to": ["tensorboard", "x"]}, "`report_to` has 'x'"),
    ],
    ids=str,
)
def test_option_that_no_run_can_have_is_refused(kind, options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        CONFIGS[kind](tmp_path, **options)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("options", "package", "cure"),
    [
        ({"report_to": "wandb"}, "wandb", "pip install wandb"),
        ({"report_to": ["trackio"]}, "trackio", "pip install trackio"),
        ({"use_liger_kernel": True}, "liger_kernel", "pip install liger-kernel"),
        ({"optim": "paged_adamw_8bit"}, "bitsandbytes", "pip install 'trl-ext[qlora]'"),
        ({"optim": "adamw_torch_8bit"}, "torchao", "pip install torchao"),
        ({"optim": "ademamix"}, "bitsandbytes", "pip install 'trl-ext[qlora]'"),
        ({"deepspeed": "zero.json"}, "deepspeed", "pip install 'trl-ext[deepspeed]'"),
    ],
    ids=str,
)
def test_package_that_is_missing_is_named_with_what_installs_it(kind, options, package, cure, tmp_path, monkeypatch):
    known = requirements.is_installed
    monkeypatch.setattr(requirements, "is_installed", lambda name: name != package and known(name))
    with pytest.raises(ValueError, match=rf"needs {package}.*: `{re.escape(cure)}`, or leave it out"):
        CONFIGS[kind](tmp_path, **options)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes when it is imported
@pytest.mark.parametrize("config", CONFIGS.values())
def test_optimizer_without_a_kernel_for_the_device_is_refused(config, tmp_path, monkeypatch):
    config(tmp_path, optim="lion_8bit", use_cpu=True, bf16=False)

    def step(*_):  # of bitsandbytes 0.45 on a CPU
        raise NameError("name 'str2optimizer8bit_blockwise' is not defined")

    monkeypatch.setattr("bitsandbytes.optim.Lion.step", step)
    with pytest.raises(
        ValueError, match=r"`optim=lion_8bit` cannot run on cpu with bitsandbytes .*choose `adafactor`"
    ):
        config(tmp_path, optim="lion_8bit", use_cpu=True, bf16=False)


@pytest.mark.parametrize("kind", ["dpo", "ppo", "reward"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": Path("my-sft")}, r"`model` is a \w+Path \(.*\); give the path as text, 'my-sft'\."),
        ({"model": 5}, r"`model` is a int \(5\); give a model, or its path\."),
        ({"processing_class": "my-sft"}, r"`processing_class` is 'my-sft'; give the tokenizer itself"),
        ({"peft_config": {"r": 8}}, r"`peft_config` is a dict; give .*LoraConfig\(\*\*peft_config\)"),
        ({"peft_config": "lora"}, r"`peft_config` is 'lora'; give a config of PEFT"),
        ({"train_dataset": "rows.jsonl"}, r"A dataset is 'rows.jsonl'; give .*load_dataset"),
        ({"train_dataset": [{"prompt": "good"}]}, r"A dataset is a list; give .*Dataset\.from_list"),
        (
            {"train_dataset": DatasetDict(train=tiny_pairs())},
            r"is a DatasetDict of 'train'; give .* `dataset\['train'\]`",
        ),
        ({"eval_dataset": {"near": "rows.jsonl"}}, r"A dataset is 'rows.jsonl'; give .*load_dataset"),
    ],
    ids=str,
)
def test_argument_of_a_trainer_of_another_kind_is_refused(kind, given, said, tmp_path):
    trainer = {"dpo": DPOTrainerX, "ppo": PPOTrainerX, "reward": RewardTrainerX}[kind]
    rewards = {"reward_funcs": lambda **_: []} if kind == "ppo" else {}
    usual = {"args": CONFIGS[kind](tmp_path), "model": "nowhere", "train_dataset": tiny_pairs()} | rewards
    with pytest.raises(ValueError, match=said):
        trainer(**usual | given)


def test_models_in_each_others_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`model` is None; give a model"):
        DPOTrainerX(None, train_dataset=tiny_pairs())
    with pytest.raises(ValueError, match=r"`ref_model` is a DPOConfigX; give it by name, `args=…`"):
        DPOTrainerX("nowhere", dpo_config(tmp_path), train_dataset=tiny_pairs())
    with pytest.raises(ValueError, match=r"is a LlamaForCausalLM, which writes text\. Give .*num_labels=1\)"):
        RewardTrainerX(tiny.tiny_actor(), train_dataset=tiny_pairs())
    assert RewardConfigX(tmp_path).bf16 is False  # on a CPU; TRL's own default is True
    assert RewardConfigX(tmp_path, bf16=True, use_cpu=True).bf16 is True


def test_one_of_two_packages_is_enough_and_quantised_loading_is_asked_for_too(monkeypatch):
    monkeypatch.setattr(requirements, "is_installed", lambda name: name == "tensorboardX")
    check_startable(SimpleNamespace(report_to=["tensorboard"], optim="adamw_torch", load_in_4bit=False))
    with pytest.raises(ValueError, match="`load_in_4bit` needs bitsandbytes"):
        check_startable(SimpleNamespace(load_in_4bit=True))
    for all_or_none in ("all", "none", ["none"], [], None):
        check_startable(SimpleNamespace(report_to=all_or_none))


@pytest.fixture
def folders(tmp_path):
    """What people give for a model, by what is wrong with it."""
    tiny.tiny_actor().save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny.tiny_actor(), adapter).save_pretrained(tmp_path / "adapter")
    return tmp_path


def trainer_of(kind, model, output):
    if kind == "dpo":
        return DPOTrainerX(str(model), args=dpo_config(output), train_dataset=tiny_pairs())
    return PPOTrainerX(
        ppo_config(output), model=str(model), reward_funcs=lambda **_: [], train_dataset=tiny.tiny_prompts(8)
    )


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bare", r"bare' \(`model`\) has no tokenizer\. Save that of BASE"),
        ("empty", r"empty' \(`model`\) holds no model: there is no config\.json"),
        ("gguf", r"gguf' \(`model`\) holds its weights as GGUF\. Convert them once: .*gguf_file='m\.gguf'"),
        ("gguf/m.gguf", r"m\.gguf' \(`model`\) holds its weights as GGUF"),
        ("broken", r"The config of .*broken' \(`model`\) cannot be read: "),
        ("broken/config.json", r"config\.json' \(`model`\) is a file\. Give the folder"),
        ("adapter", r"The adapter in .*adapter' does not say what it was trained on\. Write"),
        ("nowhere", r"There is no folder .*nowhere' \(`model`\)"),
    ],
)
def test_folder_that_is_no_model_is_refused_with_the_cure(kind, name, said, folders):
    with pytest.raises(ValueError, match=said) as error:
        trainer_of(kind, folders / name, folders / "out")
    assert len(str(error.value).splitlines()) == 1
    assert not (folders / "out").exists()


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_output_folder_that_cannot_be_written_is_refused(kind, folders):
    (folders / "file").write_text("")
    for output in (folders / "file", folders / "file" / "out"):
        with pytest.raises(ValueError, match=r"`output_dir` is .*, and (that|.*file') is a file\. Give a folder"):
            trainer_of(kind, tiny.save_tiny(folders / "whole")["actor"], output)


@pytest.mark.filterwarnings("ignore:`pad_token`", "ignore:`eos_token`")  # TRL's, that the option is deprecated
@pytest.mark.parametrize("name, kind", [("pad_token", "dpo"), ("pad_token", "reward"), ("eos_token", "reward")])
def test_token_that_the_tokenizer_lacks_is_refused_before_a_model_is_loaded(name, kind, tmp_path):
    tiny.save_tiny(tmp_path)
    (tmp_path / "actor" / "model.safetensors").write_bytes(b"")  # which could not be loaded
    trainer = {"dpo": DPOTrainerX, "reward": RewardTrainerX}[kind]
    for token, said in (("<paad>", r"Did you mean '<pad>'\? Without the option its own is used"), ("no", "It has '<")):
        args = CONFIGS[kind](tmp_path / "out", **{name: token})
        with pytest.raises(ValueError, match=rf"`{name}` is '{token}', and .* has no such token\. {said}"):
            trainer(str(tmp_path / "actor"), args=args, train_dataset=tiny_pairs())


def reward(folder, given, **options):
    datasets = [given.get(name, tiny_pairs()) for name in ("train_dataset", "eval_dataset")]
    return reward_trainer(folder, *datasets, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", [dpo_trainer, reward])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_rows_that_make_no_batch_are_refused(tmp_path, trainer, name):
    given = {name: tiny_pairs().select(range(3))}
    options = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    with pytest.raises(ValueError, match=rf"`{name}` has 3 rows, and with `per_device_{name[:4]}\w+=4` .* needs 4"):
        trainer(tmp_path, given, dataloader_drop_last=True, **options)
    trainer(tmp_path, given, **options)


def test_folder_is_made_and_tried(tmp_path, monkeypatch):
    make_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    require_writable(tmp_path / "a" / "c" / "d")
    assert not (tmp_path / "a" / "c").exists()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match=r"there \(No space left on device\)"):
        make_folder(tmp_path / "a")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=r"nothing can be written into .*Give another folder"):
        require_writable(tmp_path / "new")
