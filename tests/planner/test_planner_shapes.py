"""Sizes of models and adapters, against real models, closed forms and published counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tiny
from trl_ext.planner import SHAPES, model_shape
from trl_ext.planner.shapes import adapter_shape, load_config, meta_model


pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes and PEFT when they are imported


def count(model) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in model.parameters()}.values())


def test_llama_33b_has_its_published_parameters():
    """32.5B in Touvron et al. 2023, table 2; per layer 4 h² + 3 h f + 2 h."""
    shape = model_shape("33b")
    h, f, layers, vocab = 6656, 17920, 60, 32000
    assert shape.parameters == layers * (4 * h * h + 3 * h * f + 2 * h) + 2 * vocab * h + h
    assert shape.parameters == pytest.approx(32.5e9, rel=1e-3)
    assert shape.parameters == count(meta_model(load_config("33b")))
    assert shape.linear == layers * (4 * h * h + 3 * h * f)
    assert (shape.head, shape.largest_module, shape.largest_linear) == (vocab * h, vocab * h, h * f)


PUBLISHED = {"135m": 0.1345, "0.5b": 0.494, "1.5b": 1.544, "7b": 7.616, "8b": 8.030, "qwen3-8b": 8.191}
PUBLISHED |= {"llama-7b": 6.738, "13b": 13.016, "65b": 65.286, "70b": 70.554}


@pytest.mark.parametrize("name, billions", PUBLISHED.items())
def test_built_in_shape_has_its_published_parameters(name, billions):
    assert model_shape(name).parameters / 1e9 == pytest.approx(billions, rel=1e-3)


def test_every_built_in_shape_is_named_by_its_hub_name_too():
    assert model_shape("Qwen/Qwen3-8B").parameters == model_shape("qwen3-8b").parameters
    assert model_shape("Qwen/Qwen2.5-0.5B-Instruct").parameters == model_shape("0.5b").parameters
    assert model_shape("huggyllama/llama-30b").parameters == model_shape("33b").parameters
    assert all(model_shape(name).layers == sizes["num_hidden_layers"] for name, sizes in SHAPES.items())


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_a_real_model(tied):
    config = tiny.tiny_config(tie_word_embeddings=tied, num_key_value_heads=1)
    shape = model_shape(config)
    assert shape.parameters == count(LlamaForCausalLM(config))
    assert shape.tied is tied
    assert (shape.query, shape.key, shape.inner) == (16, 8, 32)
    scored = model_shape(config, with_score=True)
    assert scored.parameters == count(tiny.tiny_reward_model(num_key_value_heads=1))
    assert (scored.head, scored.tied) == (16, False)


EXPERTS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
EXPERTS |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": 0}


def test_experts_that_a_token_does_not_meet_are_not_active():
    shape = model_shape(MixtralConfig(**EXPERTS, num_experts_per_tok=2))
    of_expert = 3 * 64 * 128
    assert shape.parameters - shape.active == 2 * 2 * of_expert
    assert shape.inner == 2 * 128


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "down_proj"), r".*\.1\..*(v_proj|o_proj)"])
def test_adapter_has_the_parameters_of_a_real_one(targets):
    config = tiny.tiny_config(num_key_value_heads=1)
    lora = LoraConfig(r=3, target_modules=targets if isinstance(targets, str) else list(targets))
    model = get_peft_model(LlamaForCausalLM(config), lora)
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_shape(config, 3, targets).parameters == expected


def test_adapter_of_all_linear_layers_in_closed_form():
    h, f, kv, r = 16, 32, 8, 3
    of_layer = r * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))
    adapter = adapter_shape(tiny.tiny_config(num_key_value_heads=1), r, "all-linear")
    assert adapter.parameters == 2 * of_layer
    assert adapter.inputs == h + h + f  # of q, k and v; of gate and up; of down
    assert adapter.modules == 6 * h + f
    assert adapter.ranks == 7 * r


@pytest.mark.parametrize("kind", ["gpt2", "opt", "bloom", "gpt_neox"])
def test_older_families_are_counted_too(kind):
    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert model_shape(config).parameters == count(model)


def test_4_bit_loading_leaves_stacked_experts_as_they_are(tmp_path):
    """Counted on what bitsandbytes makes of a mixture of experts."""
    config = MixtralConfig(**EXPERTS)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    loaded = MixtralForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    packed = sum(m.in_features * m.out_features for m in loaded.modules() if type(m).__name__ == "Linear4bit")
    assert packed == model_shape(config).linear


GEMMA4 = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 6, "vocab_size": 64, "head_dim": 4}
GEMMA4 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 8, "num_kv_shared_layers": 0}
GEMMA4 |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 64}


def test_layers_that_differ_count_by_their_mean():
    """Gemma 4 has wider heads in some layers; its config refuses to say one width."""
    config = AutoConfig.for_model("gemma4_text", **GEMMA4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    widths = [m.out_features for name, m in model.named_modules() if name.endswith("q_proj")]
    assert len(set(widths)) == 2
    shape = model_shape(config)
    assert shape.query == round(sum(widths) / len(widths))
    assert shape.parameters == count(model)
    scored = model_shape(config, with_score=True)  # a family without a model that scores
    assert scored.parameters == count(model.model) + config.hidden_size
    assert scored.head == config.hidden_size


def test_tower_of_a_multimodal_model_is_counted():
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 4, "patch_size": 2}
    config = AutoConfig.for_model(
        "llava",
        text_config={"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 1, **text},
        vision_config={"model_type": "clip_vision_model", "projection_dim": 8, **vision},
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    shape = model_shape(config)
    assert shape.parameters == count(model) > count(model.model.language_model)
    assert (shape.hidden, shape.layers, shape.query, shape.key) == (16, 2, 16, 8)


# Configs as their classes make them: of state-space models, encoders, experts, layers that differ, and some that
# transformers itself cannot build.
ODD = "mamba rwkv aria_text deepseek_v2 gemma3n_text dbrx nemotron ministral roberta xglm reformer recurrent_gemma"


@pytest.mark.parametrize("kind", ODD.split())
@pytest.mark.parametrize("with_score", [False, True])
def test_every_family_is_planned_or_refused_in_one_sentence(kind, with_score):
    config = AutoConfig.for_model(kind)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = 2
    try:
        said = str(model_shape(config, with_score))
    except ValueError as error:
        said = str(error)
    assert said.startswith(("ModelShape(", f"The planner cannot read the sizes of a {kind!r} model ("))
    assert kind != "mamba" or said.startswith("The planner cannot")  # it has no attention heads
    assert len(said.splitlines()) == 1


def test_adapter_on_modules_that_there_are_not_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"A LoRA adapter on \['q_proj'\] of a 'gpt2' model: Target modules .* not"):
        adapter_shape(AutoConfig.for_model("gpt2", n_layer=1), 4, ("q_proj",))


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "llama", "hidden_size": "wide"}', '{"model_type": "unheard-of"}']
)
def test_config_that_cannot_be_read_is_refused_in_one_sentence(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for name in (str(tmp_path), "no/such-model"):
        with pytest.raises(ValueError, match=r"is no folder or hub name with a config .* Built-in shapes: .*33b"):
            model_shape(name)
