"""The scripts that compare plans with runs, on tiny models."""

import bitsandbytes
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from commands import script


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def test_plans_of_the_measured_runs_are_of_different_layouts(tmp_path):
    module = script("measure_memory")
    module.save_models(module.TINY, tmp_path)
    layouts = {name: module.planned(run, tmp_path).layout for name, run in module.RUNS.items()}
    assert len(set(layouts.values())) > 12
    assert {layout.trainer for layout in layouts.values()} == {"ppo", "dpo", "reward"}
    assert {layout.method for layout in layouts.values()} == {"full", "lora", "qlora"}
    assert {layout.critic for layout in layouts.values()} == {"model", "head", "none"}
    assert layouts["ppo-head-accumulated"].accumulation == 4
    assert layouts["dpo-precomputed"].reference == "none"


@pytest.mark.parametrize("run", ["tiny-full", "tiny"])
def test_gpu_measurements_run_on_a_cpu_at_small_size(tmp_path, run):
    module = script("measure_gpu")
    module.work(module.SHAPES[run], "cpu", tmp_path)
    row = (tmp_path / "row").read_text().split(" | ")
    assert len(row) == 5
    assert float(row[0]) >= 0
    assert float(row[4].replace(",", "")) > 0


def test_gpu_measurements_cover_what_is_asked_for():
    shapes = script("measure_gpu").SHAPES
    four_roles = shapes["33b-four-roles"]
    assert (four_roles["model"], four_roles["method"], four_roles["critic"]) == ("33b", "qlora", "adapter")
    assert shapes["8b-24gb"]["limit"] == 24
    assert {job["model"] for job in shapes.values()} >= {"0.5b", "1.5b", "7b"}


def test_model_built_layer_by_layer_computes_as_one_loaded_in_4_bits(tmp_path):
    """The same weights, packed one layer at a time and loaded by transformers, give the same logits."""
    models = script("measure_gpu_models")
    config = models.config_of("tiny")
    built = models.random_model(config, torch.float32, "cpu", packed=True)
    plain = AutoModelForCausalLM.from_config(config)
    unpacked = {}
    for name, module in built.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            unpacked[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
    others = {n: p for n, p in built.state_dict().items() if n in plain.state_dict() and n not in unpacked}
    plain.load_state_dict(others | unpacked)
    plain.save_pretrained(tmp_path)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(built(ids).logits, loaded(ids).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(built(ids).logits, plain(ids).logits, rtol=1e-2, atol=1e-3)
