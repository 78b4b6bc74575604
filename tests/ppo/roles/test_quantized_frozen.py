"""Reward model and reference in 4 or 8 bits, with real bitsandbytes on the CPU; and when no reference is loaded."""

import gc
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

import tiny
from plain import plain_logps
from ppo_runs import (
    changed,
    log_lines,
    logged,
    ppo_config,
    ppo_run,
    ppo_trainer,
    response_lengths,
    sequences,
    snapshot,
)
from trl_ext.models.quantization import quantization
from trl_ext.ppo.roles import offload
from trl_ext.ppo.roles.offload import WaitingWeights


NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
# bitsandbytes' kernels for some CPUs want layers in multiples of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
LAYERS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
BY_HAND = {"4bit": NF4, "8bit": BitsAndBytesConfig(load_in_8bit=True)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = {"model": tiny.tiny_actor(**SIZES), "reward_model": tiny.tiny_reward_model(**SIZES)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tiny.tiny_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


def layers_of(model):
    return {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}


def ended(ids):
    """(1, L), with an end token behind it, as reward models are trained, also where the answer was cut off."""
    return torch.tensor([ids if ids[-1] == 2 else [*ids, 2]])


# --- the reward model


@pytest.mark.integration
@pytest.mark.parametrize("bits", LAYERS)
def test_scores_are_those_of_the_checkpoint_in_fewer_bits(tmp_path, paths, bits):
    trainer = ppo_run(tmp_path, {"reward_model": paths["reward_model"]}, reward_model_quantization=bits, max_steps=1)
    model = trainer.reward_funcs[0].model
    assert layers_of(model) == {LAYERS[bits], "Linear"}
    assert type(model.score) is nn.Linear
    by_hand, full = (
        AutoModelForSequenceClassification.from_pretrained(
            paths["reward_model"], dtype=torch.float32, **options
        ).eval()
        for options in ({"quantization_config": BY_HAND[bits]}, {})
    )
    with torch.no_grad():
        expected, in_full = (
            torch.tensor(
                [
                    m(ended(prompt + response)).logits.item()
                    for prompt, response in sequences(trainer.run_state.rollout)
                ]
            )
            for m in (by_hand, full)
        )
    torch.testing.assert_close(trainer.run_state.rollout.scores, expected, rtol=2e-2, atol=2e-2)
    assert (expected - in_full).abs().max() > 1e-3
    assert (trainer.run_state.rollout.scores - in_full).norm() < in_full.norm() / 2


@pytest.mark.integration
@pytest.mark.parametrize("bits", LAYERS)
def test_critic_made_from_the_reward_model_is_the_checkpoint_in_full_precision(tmp_path, paths, bits):
    trainer = ppo_trainer(tmp_path, {"reward_model": paths["reward_model"]}, reward_model_quantization=bits)
    assert layers_of(trainer.critic) == {"Linear"}
    assert changed(trainer.critic.model, snapshot(tiny.tiny_reward_model(**SIZES))) == set()
    before = snapshot(trainer.model)
    trainer.train()
    assert any(name.startswith("critic.") for name in changed(trainer.model, before))
    assert all(line["loss"] == line["loss"] for line in log_lines(trainer))


@pytest.mark.integration
def test_every_reward_given_by_path_is_quantised(tmp_path, paths):
    models = {"reward_model": paths["reward_model"], "reward_funcs": [response_lengths, paths["reward_model"]]}
    trainer = ppo_run(tmp_path, models, reward_model_quantization="4bit", max_steps=1, critic="head")
    first, function, second = trainer.reward_funcs
    assert layers_of(first.model) == layers_of(second.model) == {"Linear4bit", "Linear"}
    assert callable(function)


# --- the reference


@pytest.mark.integration
@pytest.mark.parametrize("bits, given", [("4bit", True), ("4bit", False), ("8bit", True)])
def test_kl_is_to_the_reference_in_fewer_bits(tmp_path, paths, bits, given):
    models = {"model": paths["model"]}
    if given:
        tiny.tiny_actor(5, **SIZES).save_pretrained(tmp_path / "reference")
        models["ref_model"] = str(tmp_path / "reference")
    trainer = ppo_run(tmp_path / "run", models, ref_model_quantization=bits, max_steps=1)
    assert layers_of(trainer.ref_model) == {LAYERS[bits], "Linear"}
    assert layers_of(trainer.model) == {"Linear"}
    path = models.get("ref_model", paths["model"])
    reference = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=BY_HAND[bits]
    ).eval()
    kls = []
    for ids in sequences(trainer.run_state.rollout):
        with torch.no_grad():
            kls.append((plain_logps(tiny.tiny_actor(**SIZES), *ids) - plain_logps(reference, *ids)).sum().item())
    (kl,) = logged(trainer, "kl/ref")
    assert kl == pytest.approx(sum(kls) / len(kls), rel=5e-2, abs=5e-2)
    assert abs(kl) > 1e-3


# --- what both are made of


def test_constants_and_dtype_are_those_of_qlora_in_the_dtype_of_the_run():
    runs = {torch.float32: (False, False), torch.bfloat16: (True, False), torch.float16: (False, True)}
    for dtype, (bf16, fp16) in runs.items():
        args = SimpleNamespace(bf16=bf16, fp16=fp16)
        config = quantization("4bit", args)
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == ("nf4", True)
        assert config.bnb_4bit_compute_dtype == dtype
    assert quantization("8bit", args).load_in_8bit


@pytest.mark.integration
def test_4_bit_weights_wait_with_their_constants(paths, monkeypatch):
    monkeypatch.setattr(offload, "on_host", lambda tensor: False)
    model = AutoModelForCausalLM.from_pretrained(paths["model"], dtype=torch.float32, quantization_config=NF4)
    weights = [module.weight for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert weights

    def tensors():
        states = [weight.quant_state for weight in weights]
        parts = [part for state in states for part in (state.absmax, state.code, state.offset)]
        nested = [part for state in states for part in (state.state2.absmax, state.state2.code)]
        return [*(weight.data for weight in weights), *parts, *nested]

    def dequantised():
        return [bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state) for weight in weights]

    before = dequantised()
    waiting = WaitingWeights([model])
    pointers = [tensor.data_ptr() for tensor in tensors()]
    with waiting.on_device():
        assert not {tensor.data_ptr() for tensor in tensors()} & set(pointers)
        assert all(torch.equal(one, other) for one, other in zip(before, dequantised(), strict=True))
    assert [tensor.data_ptr() for tensor in tensors()] == pointers
    assert all(isinstance(weight, bitsandbytes.nn.Params4bit) for weight in weights)


# --- what is refused


REWARD = {"reward_model_quantization": "4bit"}
REFERENCE = {"ref_model_quantization": "4bit"}
REFUSED = {
    "reward in memory": (
        {"reward_model": tiny.tiny_reward_model()},
        REWARD,
        "`reward_model` is .* in memory. Pass its path",
    ),
    "reward function that is a model in memory": (
        {"reward_funcs": [tiny.tiny_reward_model()]},
        {"reward_model_quantization": "8bit"},
        "`reward_funcs` is .* in memory",
    ),
    "no reward model": (
        {"reward_model": None, "reward_funcs": response_lengths},
        REWARD,
        "nothing to quantise: no reward is a model",
    ),
    "reference in memory": ({"ref_model": tiny.tiny_actor()}, REFERENCE, "`ref_model` is .* in memory"),
    "copy of an actor in memory": ({"model": tiny.tiny_actor()}, REFERENCE, "`model` is .* in memory"),
    "reference that is an adapter": (
        {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")},
        REFERENCE,
        "nothing to quantise: the reference is the actor",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_quantisation_without_a_model_to_load_is_refused_before_loading(tmp_path, paths, monkeypatch, case):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    models, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, paths | models, **options)


@pytest.mark.integration
def test_checkpoint_that_is_quantised_already_is_refused(tmp_path, paths):
    model = AutoModelForSequenceClassification.from_pretrained(paths["reward_model"], quantization_config=NF4)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(ValueError, match=r"is quantised already\. Leave `reward_model_quantization` out"):
        ppo_trainer(tmp_path, {"reward_model": str(tmp_path / "quantised")}, reward_model_quantization="4bit")


@pytest.mark.integration
def test_quantised_reward_model_in_memory_is_not_copied_into_a_critic(tmp_path, paths):
    model = AutoModelForSequenceClassification.from_pretrained(paths["reward_model"], quantization_config=NF4)
    with pytest.raises(ValueError, match=r"quanti[sz]ed.* cannot be trained.* or `critic='head'`"):
        ppo_trainer(tmp_path, {"reward_model": model})


def test_missing_bitsandbytes_is_named(tmp_path, paths, monkeypatch):
    args = ppo_config(tmp_path, reward_model_quantization="4bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'trl-ext\[qlora\]'"):
        offload.check_placement(args, paths["model"], None, paths["reward_model"], [], has_adapter=False)


@pytest.mark.parametrize("name", ["reward_model_quantization", "ref_model_quantization"])
def test_unknown_number_of_bits_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`{name}` is '2bit'; it must be one of"):
        ppo_config(tmp_path, **{name: "2bit"})


def test_quantised_reference_that_is_never_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="with `kl_coef=0`: no reference is loaded"):
        ppo_config(tmp_path, kl_coef=0.0, ref_model_quantization="4bit")


# --- no reference where none is read


WITHOUT_KL = {
    "in the loss": {},
    "in the reward": {"kl_placement": "reward"},
    "exact, value head, offloading": {"kl_estimator": "full", "critic": "head", "offload_frozen_models": True},
}


def models_loaded(monkeypatch):
    """A list that fills with the class of every model that is loaded from a folder."""
    loaded = []
    load = PreTrainedModel.from_pretrained.__func__
    monkeypatch.setattr(
        PreTrainedModel,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: loaded.append(cls) or load(cls, *args, **kwargs)),
    )
    return loaded


def causal_models_alive():
    gc.collect()
    return sum(type(each) is LlamaForCausalLM for each in gc.get_objects())


@pytest.mark.integration
@pytest.mark.parametrize("case, given", list(zip(WITHOUT_KL, (False, True, True), strict=True)))
def test_reference_is_never_loaded_without_a_kl_term(tmp_path, paths, monkeypatch, case, given):
    models = paths | ({"ref_model": paths["model"]} if given else {}) | {"eval_dataset": tiny.tiny_prompts(4)}
    loaded, before = models_loaded(monkeypatch), causal_models_alive()
    trainer = ppo_run(tmp_path, models, kl_coef=0.0, max_steps=2, **WITHOUT_KL[case])
    metrics = trainer.evaluate()
    assert loaded.count(LlamaForCausalLM) == 1
    assert loaded.count(LlamaForSequenceClassification) == 1
    assert causal_models_alive() == before + 1
    assert not [key for line in [*trainer.state.log_history, metrics] for key in line if "kl/ref" in key]


@pytest.mark.integration
def test_control_with_a_kl_term_it_is_loaded_once(tmp_path, paths, monkeypatch):
    loaded, before = models_loaded(monkeypatch), causal_models_alive()
    trainer = ppo_run(tmp_path, paths | {"eval_dataset": tiny.tiny_prompts(4)}, max_steps=2)
    assert loaded.count(LlamaForCausalLM) == 2
    assert causal_models_alive() == before + 2
    assert "eval_kl/ref" in trainer.evaluate()
