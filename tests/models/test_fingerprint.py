"""The fingerprint of a model: of its weights on disk, wherever they lie and however they are sharded, or in memory."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from trl_ext.models.fingerprint import (
    adapter_fingerprint,
    base_fingerprint,
    identity_of,
    is_same,
    module_fingerprint,
    save_base_fingerprint,
    weights_fingerprint,
    why_unknown,
)


pytestmark = pytest.mark.integration


@pytest.fixture
def base(tmp_path):
    tiny.tiny_actor().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_fingerprint_is_that_of_the_weights_not_of_the_name(base, tmp_path):
    shutil.copytree(base, tmp_path / "moved")
    tiny.tiny_actor(1).save_pretrained(tmp_path / "other")
    assert weights_fingerprint(str(tmp_path / "moved")) == weights_fingerprint(str(base))
    assert weights_fingerprint(str(tmp_path / "other")) != weights_fingerprint(str(base))


def test_shards_and_the_rest_of_the_folder_do_not_count(base, tmp_path):
    tiny.tiny_actor().save_pretrained(tmp_path / "sharded", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "sharded" / "adapter_model.safetensors").write_bytes(b"")
    assert weights_fingerprint(str(tmp_path / "sharded")) == weights_fingerprint(str(base))


def test_merged_adapter_of_one_matrix_makes_another_base(base, tmp_path):
    """Norms and embeddings are those of the base: a sample of them alone would not tell the two apart."""
    torch.manual_seed(0)
    config = LoraConfig(r=1, target_modules=["layers.1.mlp.down_proj"], init_lora_weights=False)
    get_peft_model(tiny.tiny_actor(), config).merge_and_unload().save_pretrained(tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "merged"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    assert weights_fingerprint(str(tmp_path / "merged")) != weights_fingerprint(str(base))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1e-6},
        lambda tensors: tensors | {"more": torch.zeros(())},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
        lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"].flip(0)},
    ],
    ids=["value", "scalar", "missing", "dtype", "order"],
)
def test_every_change_of_the_tensors_shows(base, change):
    before = weights_fingerprint(str(base))
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors")
    assert weights_fingerprint(str(base)) not in (before, None)


def test_no_weights_have_no_fingerprint(tmp_path):
    assert weights_fingerprint(str(tmp_path)) is None


def test_fingerprint_is_written_beside_adapters_only(base, tmp_path):
    adapter = tmp_path / "adapter"
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        adapter
    )
    save_base_fingerprint([adapter, base], str(base))
    assert not (base / "base_model.json").exists()
    assert base_fingerprint(adapter, None) == weights_fingerprint(str(base))
    save_file(load_file(base / "model.safetensors") | {"more": torch.zeros(1)}, base / "model.safetensors")
    assert base_fingerprint(adapter, str(base)) != weights_fingerprint(str(base))  # what was written counts


def test_base_that_an_adapter_names_is_read_where_nothing_is_written(base, tmp_path):
    assert base_fingerprint(tmp_path, str(base)) == weights_fingerprint(str(base))
    assert base_fingerprint(tmp_path, "a-name/on-the-hub") is None
    assert base_fingerprint(tmp_path, None) is None


# A model with an adapter


@pytest.fixture
def adapter(base, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewritten(folder, **options):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def test_adapter_is_known_by_its_weights_its_scale_and_its_base(base, adapter, tmp_path):
    known = adapter_fingerprint(str(adapter), str(base))
    moved = shutil.copytree(adapter, tmp_path / "moved")
    of_no_effect = {"base_model_name_or_path": "moved", "lora_dropout": 0.5, "target_modules": ["v_proj", "q_proj"]}
    rewritten(moved, **of_no_effect, inference_mode=False, peft_version="9", of_a_later_version=None)
    assert adapter_fingerprint(str(moved), str(base)) == known
    tiny.tiny_actor(1).save_pretrained(tmp_path / "other")
    rewritten(moved, lora_alpha=99)
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    trained = shutil.copytree(adapter, tmp_path / "trained")
    save_file(tensors | {name: tensors[name] + 1e-6}, trained / "adapter_model.safetensors")
    others = [(adapter, tmp_path / "other"), (moved, base), (trained, base)]
    prints = [known, weights_fingerprint(str(base))]
    prints += [adapter_fingerprint(str(folder), str(of)) for folder, of in others]
    assert None not in prints
    assert len(set(prints)) == 5


def test_adapter_without_weights_or_a_base_on_disk_has_no_fingerprint(base, adapter):
    assert adapter_fingerprint(str(adapter), None) is None
    assert adapter_fingerprint(str(adapter), "a-name/on-the-hub") is None
    known = adapter_fingerprint(str(adapter), str(base))
    save_base_fingerprint([adapter], str(base))
    assert adapter_fingerprint(str(adapter), None) == known
    (adapter / "adapter_model.safetensors").unlink()
    assert adapter_fingerprint(str(adapter), str(base)) is None


def test_model_in_memory_is_known_by_its_tensors():
    known = module_fingerprint(tiny.tiny_actor())
    assert module_fingerprint(tiny.tiny_actor()) == known
    changed = tiny.tiny_actor()
    changed.model.norm.weight.data += 1e-6
    assert module_fingerprint(changed) not in (known, None)
    assert module_fingerprint(tiny.tiny_actor().to("meta")) is None


def test_adapter_in_memory_is_the_active_one(base, adapter):
    def loaded(name="default"):
        model = AutoModelForCausalLM.from_pretrained(base)
        return PeftModel.from_pretrained(model, adapter, adapter_name=name)

    known = module_fingerprint(loaded())
    assert module_fingerprint(loaded("another name")) == known
    with_another = loaded()
    with_another.add_adapter("idle", LoraConfig(r=1, target_modules=["k_proj"], init_lora_weights=False))
    assert module_fingerprint(with_another) == known
    assert module_fingerprint(with_another, "idle") != known
    trained, scaled = loaded(), loaded()
    next(p for name, p in trained.named_parameters() if "lora_B" in name).data += 1e-6
    next(layer for layer in scaled.modules() if isinstance(layer, BaseTunerLayer)).scaling["default"] *= 2
    assert known not in (module_fingerprint(trained), module_fingerprint(scaled))


def test_identities_are_compared_where_weights_were_read_in_the_same_way(base, adapter, tmp_path):
    tiny.tiny_actor(1).save_pretrained(tmp_path / "other")
    named = {"base": str(base), "other": str(tmp_path / "other"), "object": tiny.tiny_actor(), "none": str(tmp_path)}
    known = {name: identity_of(model, name) for name, model in named.items()}
    known["adapter"] = identity_of(str(base), "adapter", adapter=str(adapter))
    known["adapted"] = identity_of(PeftModel.from_pretrained(tiny.tiny_actor(), adapter), "adapted")
    assert is_same(known["base"], identity_of(str(base), "another name"))
    assert is_same(known["object"], identity_of(tiny.tiny_actor(), ""))
    assert [is_same(known["base"], known[name]) for name in ("other", "adapter")] == [False, False]
    for one, other in (("base", "object"), ("object", "adapted"), ("adapter", "adapted"), ("base", "none")):
        assert is_same(known[one], known[other]) is None
    assert why_unknown(known["base"], known["none"]).startswith("what none is cannot be read from files")
    assert why_unknown(known["base"], known["adapted"]) == (
        "the weights of base were read from files, and those of adapted in memory, with an adapter"
    )
