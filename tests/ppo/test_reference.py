"""The reference: a given model, a frozen copy, an adapter switched off or copied; and the check of its start."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from families.configs import member
from plain import plain_logps
from ppo_runs import changed, log_lines, logged, ppo_run, ppo_trainer, sequences, snapshot


def lora(**options):
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def actor_with_adapter(names=("default",), **options):
    """A `PeftModel` whose adapters move it visibly."""
    model = get_peft_model(tiny.tiny_actor(), lora(**options), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora(**options))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


@torch.no_grad()
def kl_by_hand(trainer, actor, reference):
    """Mean over the rollout of log π_old − log π_ref, nats per sequence."""
    rows = sequences(trainer.run_state.rollout)
    return sum((plain_logps(actor, *ids) - plain_logps(reference, *ids)).sum().item() for ids in rows) / len(rows)


def test_given_reference_is_measured_against(tmp_path):
    actor, reference = tiny.tiny_actor(0), tiny.tiny_actor(5)
    trainer = ppo_run(tmp_path, {"model": copy.deepcopy(actor), "ref_model": reference}, max_steps=1)
    before = snapshot(tiny.tiny_actor(5))
    assert logged(trainer, "kl/ref") == pytest.approx([kl_by_hand(trainer, actor, tiny.tiny_actor(5))], rel=1e-4)
    assert logged(trainer, "kl/ref")[0] > 0.5
    assert changed(reference, before) == set()
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_default_reference_is_a_frozen_copy_of_the_start(tmp_path):
    """In the second rollout, KL is between what the actor was before it and what it was at the start."""
    trainer = ppo_trainer(tmp_path, learning_rate=1e-2)
    actors = []
    generate = trainer._generate

    def keep(prompts):
        actors.append(copy.deepcopy(tiny.tiny_actor()))
        weights = trainer.model.state_dict()
        actors[-1].load_state_dict({name: weights[name].clone() for name in actors[-1].state_dict()})
        return generate(prompts)

    trainer._generate = keep
    trainer.train()
    first, second = logged(trainer, "kl/ref")
    assert first == 0.0
    assert second == pytest.approx(kl_by_hand(trainer, actors[1], tiny.tiny_actor()), rel=1e-3)
    assert abs(second) > 0.01
    assert trainer.ref_model is not trainer.model
    assert changed(trainer.ref_model, snapshot(tiny.tiny_actor())) == set()


def test_reference_of_a_new_adapter_is_the_base_model(tmp_path):
    trainer = ppo_run(tmp_path, {"peft_config": lora()}, learning_rate=1e-2)
    assert trainer.ref_model is None
    assert logged(trainer, "kl/ref")[0] == 0.0
    assert abs(logged(trainer, "kl/ref")[1]) > 1e-3
    base = {name for name, _ in trainer.model.named_parameters() if "lora" not in name and "critic" not in name}
    assert {name for name, p in trainer.model.named_parameters() if name in base and p.requires_grad} == set()


def test_given_reference_is_used_with_a_new_adapter_too(tmp_path):
    trainer = ppo_run(tmp_path, {"peft_config": lora(), "ref_model": tiny.tiny_actor(5)}, max_steps=1)
    expected = kl_by_hand(trainer, tiny.tiny_actor(0), tiny.tiny_actor(5))
    assert logged(trainer, "kl/ref") == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_that_starts_from_an_adapter_is_held_to_a_frozen_copy_of_it(tmp_path, dropout):
    start = actor_with_adapter(lora_dropout=dropout)
    trainer = ppo_trainer(tmp_path, {"model": start}, learning_rate=1e-2)
    before = snapshot(trainer.model)
    trainer.train()
    # The reference is the adapter, not the base model, from which the actor is far away.
    first, second = logged(trainer, "kl/ref")
    assert first == 0.0
    moved = {name for name in changed(trainer.model, before) if not name.startswith("base_model.model.critic.")}
    assert moved
    assert all(".default." in name for name in moved)
    twins = [name for name in before if ".ref." in name]
    assert len(twins) == 8
    for name in twins:
        assert torch.equal(before[name], before[name.replace(".ref.", ".default.")])
    base_model_kl = kl_by_hand(trainer, actor_with_adapter().eval(), tiny.tiny_actor())
    assert abs(second) < abs(base_model_kl) / 2


def test_named_adapters_are_trained_and_referred_to(tmp_path):
    model = actor_with_adapter(names=("mine", "sft"))
    reference = copy.deepcopy(model)
    actor = copy.deepcopy(model)
    actor.set_adapter("mine")
    reference.set_adapter("sft")
    trainer = ppo_trainer(tmp_path, {"model": model}, model_adapter_name="mine", ref_adapter_name="sft", max_steps=1)
    before = snapshot(trainer.model)
    trainer.train()
    moved = {name for name in changed(trainer.model, before) if not name.startswith("base_model.model.critic.")}
    assert moved
    assert all(".mine." in name for name in moved)
    assert trainer.model.active_adapter == "mine"
    assert logged(trainer, "kl/ref") == pytest.approx([kl_by_hand(trainer, actor, reference)], rel=1e-4)


# --- the check before the first step


def test_adapter_that_changes_the_model_at_the_start_is_an_error(tmp_path):
    trainer = ppo_trainer(tmp_path, {"peft_config": lora(init_lora_weights=False)})
    with pytest.raises(ValueError, match=r"KL\(actor ‖ reference\) must be 0 before the first step, but .* nats"):
        trainer.train()


def with_small_adapter(folder):
    return ppo_trainer(folder, {"peft_config": lora(init_lora_weights=False, lora_alpha=0.1)}, bf16=True, use_cpu=True)


def slightly_moved(folder):
    trainer = ppo_trainer(folder, bf16=True, use_cpu=True)
    with torch.no_grad():
        trainer.ref_model.lm_head.weight += 0.01 * torch.randn_like(trainer.ref_model.lm_head.weight)
    return trainer


@pytest.mark.parametrize("how", [with_small_adapter, slightly_moved])
def test_reference_close_by_is_an_error_in_16_bits_too(tmp_path, how):
    """The difference is below what 16 bits may round, 0.1 nats per token, but visible in the float32 weights."""
    trainer = how(tmp_path)
    with pytest.raises(ValueError, match=r"must be 0 before the first step, but .* differ by 0\.0\d+ nats"):
        trainer.train()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_copy_of_an_adapter_leaves_the_actor_as_it_was(tmp_path, start):
    """Adding a second adapter with such a config would change the base weights again."""
    actor = get_peft_model(tiny.tiny_actor(), lora(init_lora_weights=start))
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        before = actor(input_ids=ids).logits
        trainer = ppo_trainer(tmp_path, {"model": actor})
        torch.testing.assert_close(trainer.model.eval()(input_ids=ids).logits, before)


# OPT's layers keep dropout as a number and call it as a function.
@pytest.mark.parametrize(
    "actor",
    [lambda: tiny.tiny_actor(attention_dropout=0.5), lambda: member("opt", 0, noise=0.3)],
    ids=["llama", "opt"],
)
def test_dropout_is_off_in_all_four_models(tmp_path, actor):
    """With dropout the ratio of the first step would not be 1, nor KL to the reference 0."""
    models = {
        "model": actor(),
        "reward_model": tiny.tiny_reward_model(attention_dropout=0.5),
        "value_model": tiny.tiny_reward_model(7, attention_dropout=0.5),
    }
    trainer = ppo_trainer(tmp_path, models, max_steps=1)
    ids = torch.randint(7, 60, (2, 9))
    for model in (trainer.model, trainer.ref_model, trainer.reward_funcs[0].model, trainer.critic.model):
        model.train()
        once, twice = model(input_ids=ids).logits, model(input_ids=ids).logits
        assert torch.equal(once, twice)
        model.eval()
    trainer.train()
    (line,) = log_lines(trainer)
    assert line["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert line["kl/ref"] == 0.0
