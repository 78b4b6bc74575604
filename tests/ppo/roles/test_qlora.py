"""PPO on a 4-bit actor: real bitsandbytes (NF4), which runs on CPU too."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

import tiny
from ppo_runs import log_lines, ppo_run, ppo_trainer, snapshot, sum_of_terms


pytestmark = pytest.mark.integration
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def qlora(directory, **models):
    paths = tiny.save_tiny(directory)
    adapter = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    of_run = {"model": paths["actor"], "peft_config": adapter, "quantization_config": NF4}
    return of_run | {"reward_model": paths["reward_model"]} | models


@pytest.mark.parametrize("critic", ["model", "head"])
def test_adapter_and_critic_learn_on_a_4_bit_base(tmp_path, critic):
    trainer = ppo_run(tmp_path, qlora(tmp_path), critic=critic)
    layer = trainer.model.get_base_model().model.layers[0]
    assert type(layer.mlp.up_proj).__name__ == "Linear4bit"
    assert type(layer.self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    untrained = snapshot(ppo_trainer(tmp_path / "untrained", qlora(tmp_path), critic=critic).model)
    moved = {name for name, value in snapshot(trainer.model).items() if not torch.equal(value, untrained[name])}
    assert any("lora_B" in name for name in moved)
    assert any("critic" in name for name in moved)
    assert not any("up_proj" in name or "base_layer" in name for name in moved if "critic" not in name)
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), rel=1e-5)


def test_a_4_bit_trunk_is_not_copied_into_a_critic(tmp_path):
    def grade(completions, **kwargs):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"quantized and cannot be trained\. Pass a `value_model`"):
        ppo_trainer(tmp_path, qlora(tmp_path, reward_model=None, reward_funcs=grade))
