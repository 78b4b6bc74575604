"""A run that starts from a saved adapter: it equals the run from the same `PeftModel`, and names what is wrong."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

import dpo_runs
import four_roles
import ppo_runs
import tiny
from trl_ext._trl import create_model_from_path
from trl_ext.models import saved_adapter as module
from trl_ext.models.saved_adapter import adapter_folder


pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return four_roles.prepare(tmp_path_factory.mktemp("saved"))


def in_memory(paths, quantization=None):
    base = AutoModelForCausalLM.from_pretrained(paths["base"], quantization_config=quantization)
    return PeftModel.from_pretrained(base, paths["start"], is_trainable=True)


OF_THE_MACHINE = ("time/", "step_time", "train_", "tokens_per", "memory/")


def trained(trainer):
    """Log lines without times, and every weight that is trained."""
    trainer.train()
    kept = [
        {key: value for key, value in line.items() if not key.startswith(OF_THE_MACHINE)}
        for line in trainer.state.log_history
    ]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return kept, weights


def assert_same_run(runs, make, one, other):
    """Make and train the trainers of two sets of models; return the first."""
    first = make(runs / "1", one)
    lines, weights = trained(first)
    expected, expected_weights = trained(make(runs / "2", other))
    assert str(lines) == str(expected)  # NaN equals itself
    assert weights.keys() == expected_weights.keys()
    assert any("lora_" in name for name in weights)
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name
    return first


@pytest.mark.parametrize("bits", [None, four_roles.NF4], ids=["float32", "4 bits"])
@pytest.mark.parametrize("critic", ["model", "head", "adapter"])
def test_ppo_from_a_folder_is_ppo_from_the_model_to_the_last_bit(tmp_path, paths, critic, bits):
    if bits and critic == "model":
        pytest.skip("a 4-bit base has no copy to train")
    judge = {"reward_model": paths["reward"]} if critic == "adapter" else {}
    folder = {"model": paths["start"], "processing_class": None, "quantization_config": bits}
    make = partial(ppo_runs.ppo_trainer, critic=critic)
    trainer = assert_same_run(tmp_path, make, folder | judge, {"model": in_memory(paths, bits)} | judge)
    first, second = ppo_runs.logged(trainer, "kl/ref")
    assert first == 0.0
    assert second != 0.0


@pytest.mark.parametrize("bits", [None, four_roles.NF4], ids=["float32", "4 bits"])
def test_dpo_from_a_folder_is_dpo_from_the_model_to_the_last_bit(tmp_path, paths, bits):
    folder = {"model": paths["start"], "ref_model": None, "processing_class": None, "quantization_config": bits}
    in_python = {"model": in_memory(paths, bits), "ref_model": None}
    first, second = dpo_runs.lines(assert_same_run(tmp_path, dpo_runs.dpo_trainer, folder, in_python))
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    assert second["rewards/chosen"] != 0.0


def test_mutant_without_the_adapter_is_seen(tmp_path, paths, monkeypatch):
    """The oracle above fails where the base alone is loaded under a fresh adapter of the same config."""

    def fresh(base, folder):
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        return module.PeftModel(base, config)

    monkeypatch.setattr(module, "put_on", fresh)
    models = [{"model": given, "ref_model": None} for given in (paths["start"], in_memory(paths))]
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, dpo_runs.dpo_trainer, *models)


def test_adapter_saved_with_a_wider_embedding_is_loaded_onto_one(tmp_path, paths):
    model = four_roles.fill(in_memory(paths), 4)
    model.get_base_model().resize_token_embeddings(70)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = create_model_from_path(paths["base"])
    assert base.get_input_embeddings().num_embeddings == 64
    loaded = module.put_on(base, str(tmp_path))
    ids = torch.tensor([[5, 69, 3]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def copied(paths, folder, **changes):
    """The adapter with other words in its config; `None` removes one."""
    shutil.copytree(paths["start"], folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def other_base(paths, folder):
    tiny.tiny_actor(9).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return copied(paths, folder / "adapter", base_model_name_or_path=str(folder))


REFUSED = {
    "a new adapter on top": (lambda paths, _: (paths["start"], {"peft_config": four_roles.lora()}), "`trl-ext merge"),
    "an adapter that scores": (lambda paths, _: (paths["reward"], {}), "task type SEQ_CLS, which scores text"),
    "no base": (lambda paths, to: (copied(paths, to, base_model_name_or_path=None), {}), "does not say what it was"),
    "a base that is gone": (
        lambda paths, to: (copied(paths, to, base_model_name_or_path="/gone/far/away"), {}),
        r"There is no folder /gone/far/away \(the base of the adapter .*, named in its adapter_config.json\)",
    ),
    "an adapter as its base": (
        lambda paths, to: (copied(paths, to, base_model_name_or_path=paths["start"]), {}),
        "an adapter itself. Merge that one first",
    ),
    "another base": (lambda paths, to: (other_base(paths, to), {}), "was trained on other weights than those in"),
    "biases of the base": (lambda paths, to: (copied(paths, to, bias="all"), {}), "has `bias='all'`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_adapter_that_cannot_be_trained_on_is_refused_before_it_is_loaded(tmp_path, paths, case, monkeypatch):
    monkeypatch.setattr(module, "create_model_from_path", None)
    make, message = REFUSED[case]
    model, more = make(paths, tmp_path / "given")
    for run, reference in ((ppo_runs.ppo_trainer, {}), (dpo_runs.dpo_trainer, {"ref_model": None})):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "run", {"model": model} | more | reference)


def test_adapter_of_the_hub_is_downloaded_without_its_checkpoints(paths, monkeypatch):
    asked = {}

    def download(name, revision, ignore_patterns):
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return paths["start"]

    monkeypatch.setattr(module, "snapshot_download", download)
    monkeypatch.setattr(module, "find_adapter_config_file", lambda name, revision: name == "me/adapter" or None)
    assert adapter_folder("me/adapter", "v2") == paths["start"]
    assert asked == {"name": "me/adapter", "revision": "v2", "ignored": ["*/*"]}
    assert adapter_folder("me/model") is None
    assert adapter_folder(str(Path(paths["start"]))) == paths["start"]
    assert adapter_folder(paths["base"]) is None


def test_revision_of_an_adapter_is_not_that_of_its_base(paths, tmp_path):
    saved = module.saved_adapter(paths["start"], dpo_runs.dpo_config(tmp_path))
    args = dpo_runs.dpo_config(tmp_path, model_init_kwargs={"revision": "v2", "dtype": "float32"})
    assert saved.args_of_base(args).model_init_kwargs == {"dtype": "float32"}
    assert args.model_init_kwargs["revision"] == "v2"
    saved.config.revision = "base-3"
    assert saved.args_of_base(args).model_init_kwargs == {"dtype": "float32", "revision": "base-3"}
