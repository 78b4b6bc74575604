"""The fingerprint of a base: of its weights on disk, whatever the folder is called and however it is sharded."""

import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from trl_ext.models.fingerprint import base_fingerprint, save_base_fingerprint, weights_fingerprint


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
