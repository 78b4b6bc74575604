"""DPO on a 4-bit model: real bitsandbytes (NF4), which runs on CPU too; the numbers are TRL's."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

import dpo_runs
import tiny


pytestmark = pytest.mark.integration


def qlora_trainer(directory, side=dpo_runs.OURS, **options):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # bitsandbytes' kernels for CPUs want widths that 32 divides.
    tiny.tiny_actor(hidden_size=64, intermediate_size=128).save_pretrained(directory / "model")
    models = {"model": str(directory / "model"), "ref_model": None, "peft_config": lora}
    options = {"learning_rate": 0.05, "model_init_kwargs": {"dtype": torch.float32}} | options
    return dpo_runs.dpo_trainer(directory / "run", models | {"quantization_config": nf4}, side, **options)


def repacks(module):
    return getattr(module, "support_avx512bf16_for_cpu", False)


def test_an_evaluation_leaves_the_4_bit_base_differentiable(tmp_path, monkeypatch):
    """On CPUs with AVX512-BF16, a pass in eval mode would repack it; what it is repacked to has no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    trainer = qlora_trainer(tmp_path, max_steps=1)
    assert not any(repacks(module) for module in trainer.model.modules())
    trainer.evaluate(dpo_runs.tiny_pairs(4, seed=4))
    gradients = dpo_runs.KeepGradients()
    trainer.add_callback(gradients)
    trainer.train()
    expected = dpo_runs.KeepGradients()
    untouched = qlora_trainer(tmp_path / "untouched", max_steps=1)
    untouched.add_callback(expected)
    untouched.train()
    assert dpo_runs.gradient_difference(gradients.steps[0], expected.steps[0]) < 1e-3


def test_packed_and_padded_rows_give_the_same_on_a_4_bit_base(tmp_path):
    """With an adapter in float32, which TRL puts in bfloat16."""
    lines, gradients = [], []
    for packing in (True, False):
        trainer = qlora_trainer(tmp_path, packing=packing, max_steps=2)
        for parameter in filter(lambda parameter: parameter.requires_grad, trainer.model.parameters()):
            parameter.data = parameter.data.float()
        assert trainer._forwards[0].packing.on == packing
        gradients.append(dpo_runs.KeepGradients())
        trainer.add_callback(gradients[-1])
        trainer.train()
        lines.append(dpo_runs.lines(trainer))
    assert len(lines[0]) == 2
    for packed, padded in zip(*lines, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/margins"):
            assert packed[key] == pytest.approx(padded[key], rel=1e-5, abs=1e-6), key
    for packed, padded in zip(*(of_run.steps for of_run in gradients), strict=True):
        assert dpo_runs.gradient_difference(packed, padded) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_on_a_4_bit_base_gives_trl_s_numbers_over_shared_rows(tmp_path, checkpointing):
    logs = []
    for side in (dpo_runs.OURS, dpo_runs.TRLS):
        trainer = qlora_trainer(tmp_path, side, gradient_checkpointing=checkpointing)
        assert type(trainer.model.get_base_model().model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        logs.append(dpo_runs.lines(trainer))
        moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
        assert moved
        assert all("lora_" in name for name in moved)
        if side == dpo_runs.OURS:
            assert trainer._forwards[0].packing.on
    ours, theirs = logs
    assert ours[-1]["rewards/margins"] != 0
    for mine, line in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected"):
            # The adapter is in bfloat16: 8 bits, whose rounding the two orders of summation share but not to the last.
            assert mine[key] == pytest.approx(line[key], rel=1e-3), key
