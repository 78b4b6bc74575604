"""`--model ADAPTER`, the commands that a run with an adapter prints at its end, and `trl-ext merge`."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

import four_roles
import tiny
from cli_runs import error_of, run_of
from commands import build
from trl_ext.cli.main import main
from trl_ext.models import merging
from trl_ext.runs.facts import bits_of, quantisation_words


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

IDS = torch.tensor([[5, 9, 12, 30, 7], [11, 8, 40, 3, 22]])
PAIRS = {"max_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no"}
PPO = {"total_episodes": 4, "per_device_train_batch_size": 4, "num_ppo_epochs": 1, "save_strategy": "no"}
LORA = ["--use_peft", "--lora_target_modules", "all-linear", "--lora_r", "2"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return four_roles.prepare(tmp_path_factory.mktemp("adapters"))


def commands_of(text):
    """The last lines' commands by name, and each as the words behind `trl-ext`."""
    lines = text[text.index("Everything is in ") :].splitlines()[1:]
    named = dict(line.strip().split(maxsplit=1) for line in lines if line.startswith("  "))
    return {name: [shlex.split(part)[1:] for part in words.split(" && ")] for name, words in named.items()}


# --- a run that starts from an adapter


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_adapter_goes_on_being_trained_on_its_base(name, paths, adapters, tmp_path, capsys):
    words = run_of(name, paths | {"actor": adapters["start"]}, output_dir=tmp_path / "out")
    trainer = build(name, words)
    start = load_file(Path(adapters["start"]) / "adapter_model.safetensors")
    trained = {key: value for key, value in trainer.model.named_parameters() if value.requires_grad}
    of_adapter = {key: value for key, value in trained.items() if "lora_" in key}
    assert len(of_adapter) == len(start)
    for key, value in start.items():
        assert torch.equal(of_adapter[key.replace(".weight", ".default.weight")], value)
    assert not any(".base_layer." in key for key in trained)
    main([name, *words, "--dry_run"])
    assert "This was a dry run" in capsys.readouterr().out


def test_critic_of_an_adapter_is_pretrained_and_ppo_goes_on_with_both(paths, adapters, tmp_path, capsys):
    given = paths | {"actor": adapters["start"]}
    words = run_of("ppo", given, output_dir=tmp_path / "critic", max_passes=1, test_size=4, **PPO)
    main(["critic", *words])
    (words,) = commands_of(capsys.readouterr().out)["next"]
    assert words[words.index("--model") + 1] == str(adapters["start"])
    main([*words, "--total_episodes", "4", "--num_ppo_epochs", "1", "--save_strategy", "no"])
    names = load_file(tmp_path / "critic-ppo" / "adapter_model.safetensors").keys()
    assert names == load_file(Path(adapters["start"]) / "adapter_model.safetensors").keys()


def test_dry_run_plans_the_base_with_an_adapter(paths, adapters, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--dry_run", "--gpu", "a100-80gb"]
    main(["dpo", *run_of("dpo", paths | {"actor": adapters["start"]}), *words])
    saved = capsys.readouterr().out
    main(["dpo", *run_of("dpo", paths | {"actor": adapters["base"]}), *words, "--use_peft", "--lora_r", "2"])
    assert saved == capsys.readouterr().out


@pytest.mark.parametrize("name", ["ppo", "dpo", "reward", "critic"])
def test_adapter_in_place_of_a_model_is_told_to_be_merged(name, paths, adapters, tmp_path, capsys):
    words = [name, *run_of("ppo" if name == "critic" else name, paths | {"actor": adapters["start"]})]
    words += ["--output_dir", str(tmp_path / "out"), "--use_peft"]
    for more in ([], ["--dry_run"]):
        said = error_of([*words, *more], capsys)
        assert said.startswith(f"error: '{adapters['start']}' (`--model`) is an adapter")
        assert f"`trl-ext merge {adapters['start']} --output_dir {adapters['start']}-merged`" in said
        assert said.count("\n") == 0


def test_adapter_is_scored_and_talked_to_without_a_tokenizer_of_its_own(
    adapters, paths, tmp_path, monkeypatch, capsys
):
    bare = tmp_path / "bare"
    shutil.copytree(adapters["start"], bare, ignore=shutil.ignore_patterns("*token*"))
    margins = []
    for folder in (bare, adapters["start"]):
        output = tmp_path / f"scores-{len(margins)}.jsonl"
        main(["score", "--model", str(folder), "--dataset_name", paths["pairs"], "--output_file", str(output)])
        margins.append([json.loads(line)["margin"] for line in output.read_text().splitlines()])
    assert margins[0] == margins[1]
    assert any(margins[0])
    said = iter(["good film", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    capsys.readouterr()
    main(["chat", str(bare), "--max_new_tokens", "5"])
    assert len(capsys.readouterr().out.split()) > len(
        "Say something; an empty line ends it, /new starts over.".split()
    )


def test_dpo_with_an_adapter_goes_on_to_ppo_and_ppo_to_more_of_it(paths, tmp_path, monkeypatch, capsys):
    """Each command as printed; of what is not printed, how long the run is and where its log goes."""
    monkeypatch.chdir(tmp_path)
    main(["dpo", *run_of("dpo", paths, output_dir="my run/", **PAIRS), *LORA])
    commands = commands_of(capsys.readouterr().out)
    reward, ppo = commands["next"]
    pairs, short = ([word for k, v in kind.items() for word in (f"--{k}", str(v))] for kind in (PAIRS, PPO))
    quiet = ["--report_to", "none"]
    main([*reward, *pairs, *quiet])
    main([*ppo, *short, "--response_length", "4", *quiet])
    first = commands_of(capsys.readouterr().out)
    config = json.loads((tmp_path / "my run-ppo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(paths["actor"])
    (words,) = first["next"]
    main(words)
    assert (tmp_path / "my run-ppo-next" / "critic" / "adapter_model.safetensors").is_file()
    (merge,) = first["merge"]
    main(merge)
    assert "It is an adapter on the same base" in capsys.readouterr().out
    assert (tmp_path / "my run-ppo-merged" / "model.safetensors").is_file()


def test_next_of_ppo_with_a_new_adapter_trains_it_further(paths, tmp_path, capsys):
    words = ["ppo", *run_of("ppo", paths, output_dir=tmp_path / "1", **PPO), *LORA]
    main([*words, "--critic", "head", "--overwrite"])
    (words,) = commands_of(capsys.readouterr().out)["next"]
    assert not {"--lora_r", "--overwrite"} & set(words)
    main(words)
    names = load_file(tmp_path / "1-next" / "adapter_model.safetensors").keys()
    assert names == load_file(tmp_path / "1" / "adapter_model.safetensors").keys()


# --- merge


def merge(adapter, output, *more):
    main(["merge", str(adapter), "--output_dir", str(output), *more])
    return str(output)


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def exact(adapters):
    """Weights of base and adapter put together by hand, W + α/r · B A, in float64."""
    weights = {k: v.double() for k, v in AutoModelForCausalLM.from_pretrained(adapters["base"]).state_dict().items()}
    saved = load_file(Path(adapters["start"]) / "adapter_model.safetensors")
    for key in [key for key in saved if "lora_A" in key]:
        delta = saved[key.replace("lora_A", "lora_B")].double() @ saved[key].double()
        weights[key.removeprefix("base_model.model.").replace("lora_A.", "")] += 4 / 2 * delta
    return weights


@pytest.mark.parametrize("dtype", ["float32", None])
def test_merged_weights_and_logits_are_the_adapters_within_one_rounding(adapters, tmp_path, dtype):
    folder = merge(adapters["start"], tmp_path / "m", *(["--dtype", dtype] if dtype else []))
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    kind = getattr(torch, dtype or "bfloat16")
    assert merged.dtype == kind
    for name, weight in exact(adapters).items():
        assert torch.allclose(merged.state_dict()[name].double(), weight, rtol=torch.finfo(kind).eps, atol=1e-7), name
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapters["start"]))
    base = logits(AutoModelForCausalLM.from_pretrained(adapters["base"]))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[kind]
    assert torch.allclose(logits(merged.float()), expected, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(base, expected, atol=tolerance, rtol=tolerance)


def test_merged_folder_is_whole(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SHARD", "10KB")
    folder = Path(merge(adapters["start"], tmp_path / "m"))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert "model.safetensors.index.json" in names
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not any("adapter" in name for name in names)
    card = (folder / "README.md").read_text()
    assert "base_model" not in card  # a folder has no page on the hub
    assert "in bfloat16." in card
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert pipeline("text-generation", model=str(folder))("good", max_new_tokens=2)


def test_adapter_from_4_bits_is_merged_into_what_it_was_trained_on(tmp_path, capsys):
    tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapter = four_roles.save_adapter(str(tmp_path / "base"), tmp_path / "adapter", "CAUSAL_LM", 1)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=torch.float32)
    words = quantisation_words(nf4)
    assert bits_of(words) == options
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"facts": {"quantisation": words}}))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "m", "--dtype", "float32"))
    assert "4 bits" in capsys.readouterr().out
    assert "4 bits" in (tmp_path / "m" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "m" / "config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=nf4)
    with torch.no_grad():  # in training mode: some CPUs' kernels for inference compute in bfloat16
        expected = PeftModel.from_pretrained(base, adapter).train()(IDS).logits
    whole = merge(adapter, tmp_path / "whole", "--dtype", "float32", "--load_in_4bit", "False")
    assert "4 bits" not in (Path(whole) / "README.md").read_text()
    far = (logits(AutoModelForCausalLM.from_pretrained(whole)) - expected).abs().max()
    near = (logits(merged) - expected).abs().max()
    assert near < 1e-4
    assert far > 100 * near
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"facts": {"quantisation": "8 bits, bitsandbytes"}}))
    in_8_bits = merge(adapter, tmp_path / "of 8 bits", "--dtype", "float32")
    assert "in 8 bits; it is merged into the base as it was saved" in capsys.readouterr().out
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(in_8_bits)), logits(AutoModelForCausalLM.from_pretrained(whole))
    )


@pytest.mark.parametrize("labels", [1, 3])
def test_adapter_of_a_reward_model_becomes_a_reward_model(adapters, tmp_path, labels):
    base = AutoModelForSequenceClassification.from_pretrained(adapters["base"], num_labels=labels)
    four_roles.fill(get_peft_model(base, four_roles.lora("SEQ_CLS")), 1).save_pretrained(tmp_path / "adapter")
    expected = logits(base)
    folder = merge(tmp_path / "adapter", tmp_path / "m", "--dtype", "float32")
    merged = AutoModelForSequenceClassification.from_pretrained(folder)
    assert merged.config.num_labels == labels
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def test_what_cannot_be_merged_is_said_in_a_line(adapters, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    cases = {
        (adapters["start"], "full"): "full` is not empty. Give a new folder",
        (adapters["base"], "new"): "holds no adapter (there is no adapter_config.json), so there is nothing to merge",
        ("nowhere/at/all", "new"): "There is no folder 'nowhere/at/all' (`trl-ext merge`)",
    }
    for (adapter, output), message in cases.items():
        said = error_of(["merge", str(adapter), "--output_dir", str(tmp_path / output)], capsys)
        assert message in said
        assert said.count("\n") == 0
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note.txt"]
    assert not (tmp_path / "new").exists()
