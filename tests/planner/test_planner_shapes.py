"""Sizes of models and adapters, against real models, closed forms and published counts."""

import copy
import dataclasses

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
from trl_ext.planner import Hardware, Layout, catalogue, model_shape, plan, shapes, suggest
from trl_ext.planner.catalogue import load_config
from trl_ext.planner.counting import count as count_config
from trl_ext.planner.counting import meta_model
from trl_ext.planner.counts import of_catalogue
from trl_ext.planner.shapes import adapter_shape


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


# Billions of parameters in the models' cards and reports, towers included: SmolLM2, SmolLM3, Qwen2.5, Qwen3, LLaMA
# (Touvron et al. 2023, table 2), Llama 3, Gemma 3 (its report, table 1), Gemma 4, Mistral, Mixtral, Phi-4, OLMo 2,
# gpt-oss (its card, table 1), DeepSeek-V3.
PUBLISHED = """
    smollm2-135m 0.135  smollm2-360m 0.362  smollm2-1.7b 1.71  smollm3-3b 3.08
    qwen2.5-0.5b 0.494  qwen2.5-1.5b 1.54  qwen2.5-3b 3.09  qwen2.5-7b 7.61  qwen2.5-14b 14.7  qwen2.5-32b 32.5
    qwen2.5-72b 72.7  qwen3-0.6b 0.6  qwen3-1.7b 1.7  qwen3-4b 4.0  qwen3-8b 8.2  qwen3-14b 14.8  qwen3-32b 32.8
    qwen3-30b-a3b 30.5  qwen3-235b-a22b 235  llama-7b 6.7  llama-13b 13.0  llama-33b 32.5  llama-65b 65.2
    llama-3.2-1b 1.23  llama-3.2-3b 3.21  llama-3.1-8b 8.03  llama-3.1-70b 70.6  llama-3.1-405b 405
    gemma-3-1b 1.0  gemma-3-4b 4.3  gemma-3-12b 12.19  gemma-3-27b 27.43
    gemma-4-e2b 5.1  gemma-4-e4b 8.0  gemma-4-26b-a4b 25.8  gemma-4-31b 31.3
    mistral-7b 7.25  mistral-small-24b 23.6  mixtral-8x7b 46.7  mixtral-8x22b 141  phi-4 14.7  phi-4-mini 3.84
    olmo-2-7b 7.3  olmo-2-13b 13.7  gpt-oss-20b 20.9  gpt-oss-120b 116.8  deepseek-v3 671
"""
# Of a mixture of experts, those that one token meets.
ACTIVE = {"qwen3-30b-a3b": 3.3, "qwen3-235b-a22b": 22, "mixtral-8x7b": 12.9, "mixtral-8x22b": 39, "deepseek-v3": 37}
ACTIVE |= {"gpt-oss-20b": 3.6 + 0.58, "gpt-oss-120b": 5.1 + 0.58}  # its card leaves the embedding out


def test_catalogue_has_the_published_numbers_of_parameters():
    words = PUBLISHED.split()
    published = dict(zip(words[::2], map(float, words[1::2]), strict=True))
    assert published.keys() == catalogue.SHAPES.keys()
    for name, billions in published.items():
        assert (name, model_shape(name).parameters / 1e9) == (name, pytest.approx(billions, rel=0.02))
    for name, billions in ACTIVE.items():
        assert (name, model_shape(name).active / 1e9) == (name, pytest.approx(billions, rel=0.06))


# The smallest of each family
FAMILIES = {sizes["model_type"]: name for name, sizes in reversed(catalogue.SHAPES.items())}


@pytest.mark.integration
def test_counts_of_the_catalogue_are_those_of_transformers_models():
    """`python -m trl_ext.planner.counting` writes them anew."""
    stored = of_catalogue()
    assert stored.keys() == catalogue.SHAPES.keys()
    for name in FAMILIES.values():
        assert (name, count_config(load_config(name))) == (name, dataclasses.replace(stored[name], adapted=[]))
    for name, sizes in catalogue.SHAPES.items():
        text = sizes.get("text_config", sizes)
        numbers = [text[field] for field in ("num_hidden_layers", "hidden_size", "vocab_size")]
        assert [stored[name].layers, stored[name].hidden, stored[name].vocab] == numbers
        experts = text.get("num_experts_per_tok") or text.get("top_k_experts")
        width = text.get("moe_intermediate_size", text["intermediate_size"])
        assert stored[name].inner == (experts or 1) * width


def shallow(name):
    """The config of the catalogue with few layers."""
    sizes = copy.deepcopy(catalogue.SHAPES[name])
    text = sizes.get("text_config", sizes)
    text["num_hidden_layers"] = layers = 6 if "gemma-4" in name else 4
    if "layer_types" in text:
        text |= {"layer_types": text["layer_types"][:layers], "num_kv_shared_layers": 0}
    return AutoConfig.for_model(sizes.pop("model_type"), **sizes)


@pytest.mark.integration
@pytest.mark.parametrize("name", FAMILIES.values())
def test_score_heads_and_adapters_of_the_catalogue_are_those_of_real_models(name, monkeypatch):
    """Its models need neither be built with a score nor be given to PEFT to count both."""
    config = shallow(name)
    scored, expected = shapes.shape_of(count_config(config).with_score()), model_shape(config, with_score=True)
    assert dataclasses.replace(scored, name=expected.name) == expected
    # PEFT refuses the projections of Gemma 4's vision tower by name.
    for targets in ("all-linear", ("o_proj", "down_proj"))[: 1 if "gemma-4" in name else 2]:
        counted = adapter_shape(config, 16, targets)
        with monkeypatch.context() as patch:
            patch.setattr(shapes, "_adapted", lambda *_: [])  # so that PEFT is asked
            assert adapter_shape(config, 16, targets) == counted


@pytest.mark.parametrize(
    "said, meant",
    [
        ("Qwen/Qwen3-8B", "qwen3-8b"),
        ("qwen3 8b", "qwen3-8b"),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3-4b"),
        ("0.6b", "qwen3-0.6b"),
        ("huggyllama/llama-30b", "llama-33b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3.1-8b"),
        ("llama3.2-1b", "llama-3.2-1b"),
        ("Llama-3.3-70B-Instruct", "llama-3.1-70b"),
        ("google/gemma-3-4b-it", "gemma-3-4b"),
        ("gemma4-31b", "gemma-4-31b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b"),
        ("HuggingFaceTB/SmolLM3-3B-Base", "smollm3-3b"),
        ("235b", "qwen3-235b-a22b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("allenai/OLMo-2-1124-7B-SFT", "olmo-2-7b"),
        ("phi4", "phi-4"),
        ("qwen3:8b", "qwen3-8b"),
        ("llama-70b", "llama-3.1-70b"),
        ("Qwen/Qwen2.5-Coder-7B-Instruct", "qwen2.5-7b"),
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", "qwen3-30b-a3b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", None),
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", "mistral-small-24b"),
        ("HuggingFaceH4/zephyr-7b-beta", "mistral-7b"),
        ("someone/qwen3-8b-of-mine", None),
        ("9b", None),
    ],
)
def test_names_that_people_use_find_the_catalogue(said, meant):
    assert catalogue.find(said) == meant


def test_a_config_is_read_once_by_a_plan_and_by_a_search(tmp_path, monkeypatch):
    read, given = AutoConfig.from_pretrained, []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: given.append(name) or read(name))
    tiny.tiny_config().save_pretrained(tmp_path)
    layout = Layout(accumulation=4, rollout=4)
    plan(str(tmp_path), layout, Hardware())
    assert suggest(str(tmp_path), layout, Hardware())
    assert given == [str(tmp_path)]
    tiny.tiny_config(hidden_size=32).save_pretrained(tmp_path)
    assert plan(str(tmp_path), layout, Hardware()).models.actor.hidden == 32
    plan("Qwen/Qwen3-8B", layout, Hardware())  # of the catalogue
    assert len(given) == 2


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
    known = {"meta-llama/llama3.1-80b": "Did you mean `--model llama-3.1-70b`", "xyzzy": "For example: `--model 8b`"}
    known |= {"google/gemma-2-9b-it": "mean `--model gemma-3-12b`", "9b": "mean `--model qwen3-8b`.*llama-3.1-8b"}
    known |= {"llama-8": "Did you mean `--model llama-3.1-8b`"}
    for name, hint in ({str(tmp_path): r"that can be read\.$"} | known).items():
        with pytest.raises(ValueError, match=rf"is no folder or hub name with a config .*{hint}"):
            model_shape(name)
