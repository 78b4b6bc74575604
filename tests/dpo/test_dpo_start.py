"""DPO's own reference is the model that training starts from, however that came about; or the run stops."""

import math
import re

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

import dpo_runs
import tiny


pytestmark = pytest.mark.integration


def lora(start=False):
    """An adapter that already does something, unless told otherwise."""
    return LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=start)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with another model than training starts from."""
    folder = tmp_path_factory.mktemp("saved")
    dpo_runs.tiny_model(seed=7).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained_in_this_process(folder):
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return model


def merged(folder):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return get_peft_model(load(folder), lora()).merge_and_unload().requires_grad_(True)


def injected(folder):
    """transformers' own adapters, which are no `PeftModel`."""
    model = load(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        try:
            model.add_adapter(lora())
        except ValueError as error:  # transformers 5.24 wants a PEFT that was not there when it came out
            if "version of PEFT" not in str(error):
                raise
            pytest.skip(str(error))
    return model


def resized(folder):
    model = load(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model.resize_token_embeddings(70)
    return model


def from_config(folder):
    return dpo_runs.tiny_model()


def behind_hooks(folder):
    places = {"model": "cpu", "lm_head": "cpu"}
    return dispatch_model(trained_in_this_process(folder), places, main_device="cpu", force_hooks=True)


MADE = {
    make.__name__: make for make in (trained_in_this_process, merged, injected, resized, from_config, behind_hooks)
}


def assert_starts_at_its_reference(trainer, start, tolerance=0.0):
    """The first line and its reference's log-probabilities against `start`, one sequence at a time."""
    log_2 = pytest.approx(math.log(2), abs=max(tolerance, 1e-6))
    assert trainer.evaluate()["eval_loss"] == log_2
    trainer.train()
    first, second = dpo_runs.lines(trainer)
    assert first["loss"] == log_2
    assert first["preference/gradient_weight"] == pytest.approx(0.5, abs=max(tolerance, 1e-6))
    for name in ("logps/chosen_drift", "logps/rejected_drift", "rewards/margins"):
        assert abs(first[name]) <= tolerance
    assert second["rewards/margins"] != 0
    row = trainer.train_dataset[0]
    expected = dpo_runs.slow_logps(start, row["prompt_ids"], row["chosen_ids"])
    got = dpo_runs.slow_logps(trainer.ref_model, row["prompt_ids"], row["chosen_ids"])
    assert got == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("how", MADE)
def test_policy_in_memory_is_its_own_reference(tmp_path, saved, how):
    models = {"model": MADE[how](saved), "ref_model": None, "eval_dataset": dpo_runs.tiny_pairs(5, seed=4)}
    assert_starts_at_its_reference(dpo_runs.dpo_trainer(tmp_path, models), MADE[how](saved))


def test_policy_of_an_earlier_run_is_its_own_reference(tmp_path, saved):
    """Trainers leave functions in a model that hold on to it: the copy must not compute with the policy's weights."""
    earlier = dpo_runs.dpo_run(tmp_path / "1", {"model": load(saved), "ref_model": None}, learning_rate=1.0)
    start = load(saved)
    start.load_state_dict(earlier.model.state_dict())
    models = {"model": earlier.model, "ref_model": None, "eval_dataset": dpo_runs.tiny_pairs(5, seed=4)}
    trainer = dpo_runs.dpo_trainer(tmp_path / "2", models, learning_rate=1.0)
    assert all(forward.packing.on for forward in trainer._forwards)
    assert_starts_at_its_reference(trainer, start)
    asked = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    asked |= {"labels": torch.tensor([[-100, 5, 6]]), "fused_lm_head": True}
    with torch.no_grad():
        before = trainer.ref_model(**asked).log_probs
        for parameter in trainer.model.parameters():
            parameter.zero_()
        assert torch.equal(trainer.ref_model(**asked).log_probs, before)


PRECISIONS = {
    "autocast": ({"bf16": True}, torch.float32),
    "16-bit weights": ({}, torch.bfloat16),
    "both": ({"bf16": True}, torch.bfloat16),
}


@pytest.mark.parametrize("reference", ["copy", "precomputed", "adapter off", "adapter ref"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_margins_are_0_before_the_first_step_in_16_bits(tmp_path, precision, reference):
    options, dtype = PRECISIONS[precision]
    model = dpo_runs.tiny_model().to(dtype)
    models = {"model": model, "ref_model": None}
    if reference == "adapter off":
        models["peft_config"] = lora(True)
    elif reference == "adapter ref":
        models["model"] = dpo_runs.with_adapter(model)
    options = options | {"precompute_ref_log_probs": reference == "precomputed", "learning_rate": 1.0}
    trainer = dpo_runs.dpo_run(tmp_path, models, **options)
    first, second = dpo_runs.lines(trainer)
    tolerance = 0.02 if reference == "precomputed" else 1e-3  # precomputed in other batches
    assert first["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert abs(first["rewards/margins"]) < tolerance
    assert second["rewards/margins"] != first["rewards/margins"]


def test_reference_that_follows_the_policy_follows_from_its_start(tmp_path, saved):
    """Mixed at each step with weight 1, the reference is the policy again before the next."""
    models = {"model": trained_in_this_process(saved), "ref_model": None}
    options = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 1}
    trainer = dpo_runs.dpo_run(tmp_path, models, learning_rate=1.0, **options)
    assert [line["loss"] for line in dpo_runs.lines(trainer)] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    start = trained_in_this_process(saved)
    assert not torch.equal(trainer.ref_model.lm_head.weight, start.lm_head.weight)


def changed_after(by=1.0, dtype=torch.float32, **options):
    """A trainer whose policy was changed since it was made."""

    def make(folder):
        models = {"model": dpo_runs.tiny_model().to(dtype), "ref_model": None}
        trainer = dpo_runs.dpo_trainer(folder, models, **options)
        weight = trainer.model.model.layers[0].mlp.down_proj.weight
        with torch.no_grad():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(dtype), alpha=by)
        return trainer

    return make


def with_new_adapter(start):
    def make(folder):
        return dpo_runs.dpo_trainer(folder, {"ref_model": None, "peft_config": lora(start)})

    return make


def noisy(folder):
    trainer = dpo_runs.dpo_trainer(folder, {"ref_model": None})
    trainer.model.model.norm.register_forward_hook(lambda module, args, states: states + torch.randn_like(states))
    return trainer


ELSEWHERE = {
    "policy changed": (changed_after(), "1 weights differ, the first is model.layers.0.mlp.down_proj.weight"),
    "changed after precomputing": (
        changed_after(precompute_ref_log_probs=True),
        "It was computed when the trainer was made, so the policy was changed after that",
    ),
    "PiSSA": (with_new_adapter("pissa"), r"\('default': LoraConfig with `init_lora_weights='pissa'`\)"),
    "adapter that does something": (with_new_adapter(False), "changes the model before it has learnt anything"),
    "noise": (noisy, "Their weights are equal, so the forward pass is not deterministic"),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_reference_elsewhere_stops_the_run_before_the_first_step(tmp_path, kind):
    make, what = ELSEWHERE[kind]
    trainer = make(tmp_path)
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match=f"the reference must be the model that training starts from.*{what}"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))


def with_small_adapter(folder):
    small = lora()
    small.lora_alpha = 0.25
    return dpo_runs.dpo_trainer(folder, {"ref_model": None, "peft_config": small}, bf16=True)


SLIGHTLY = {  # in 16 bits, by less than the most that rounding explains in any model, 0.2 nats per √token
    "policy changed": changed_after(by=0.03, bf16=True),
    "adapter that does something": with_small_adapter,
    "changed after precomputing": changed_after(by=0.05, bf16=True, precompute_ref_log_probs=True),
    "16-bit weights": changed_after(by=0.05, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", SLIGHTLY)
def test_reference_close_by_stops_a_run_in_16_bits(tmp_path, kind):
    trainer = SLIGHTLY[kind](tmp_path)
    with pytest.raises(ValueError, match="the reference must be the model that training starts from") as error:
        trainer.train()
    found, explained = map(
        float, re.search(r"is (\S+) nats in the mean, where rounding explains (\S+)\.", str(error.value)).groups()
    )
    assert 0.1 < found < 0.5
    assert found > explained


def test_rounding_of_a_rough_model_is_let_pass(tmp_path):
    """DoRA computes each layer as it was, but in other steps, which round otherwise."""
    models = {"model": dpo_runs.tiny_model().to(torch.bfloat16), "ref_model": None}
    models["peft_config"] = LoraConfig(r=2, task_type="CAUSAL_LM", use_dora=True)
    line = dpo_runs.lines(dpo_runs.dpo_run(tmp_path, models, bf16=True, max_steps=1))[0]
    assert 0 < abs(line["logps/chosen_drift"]) < 0.1


def test_reference_that_was_given_may_be_any_model(tmp_path):
    models = {"ref_model": dpo_runs.tiny_model(), "peft_config": lora("pissa")}
    trainer = dpo_runs.dpo_run(tmp_path, models)
    assert dpo_runs.lines(trainer)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_second_call_of_train_goes_on_from_the_first(tmp_path):
    trainer = dpo_runs.dpo_run(tmp_path, {"ref_model": None}, learning_rate=1.0)
    trainer.train()
    assert dpo_runs.lines(trainer)[-1]["rewards/margins"] != 0


def test_virtual_tokens_are_said_to_change_the_model(tmp_path, caplog):
    virtual = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    dpo_runs.dpo_run(tmp_path, {"ref_model": None, "peft_config": virtual}, max_steps=1)
    assert "The adapter's virtual tokens change the model before they have learnt anything" in caplog.text


@pytest.mark.parametrize("name, active", [("mine", "mine"), ("default", "other")])
def test_adapter_that_trl_would_not_copy_is_refused(tmp_path, name, active):
    model = get_peft_model(dpo_runs.tiny_model(), lora(), adapter_name=name)
    if active != name:
        model.add_adapter(active, lora())
        model.set_adapter(active)
    with pytest.raises(ValueError, match="must be named 'default' and be the active one"):
        dpo_runs.dpo_trainer(tmp_path, {"ref_model": None, "model": model})


def test_adapter_of_an_earlier_run_needs_a_new_copy(tmp_path):
    models = {"ref_model": None, "model": dpo_runs.with_adapter(dpo_runs.tiny_model())}
    dpo_runs.dpo_run(tmp_path / "1", models, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"model.delete_adapter\('ref'\)"):
        dpo_runs.dpo_trainer(tmp_path / "2", models)
    models["model"].delete_adapter("ref")
    trainer = dpo_runs.dpo_run(tmp_path / "3", models, learning_rate=1.0)
    first, second = dpo_runs.lines(trainer)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["rewards/margins"] != 0
