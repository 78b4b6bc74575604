"""What the package says of models that ZeRO-3 will partition, as far as one process can tell."""

import copy
import functools
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from trl_ext.models import sharding
from trl_ext.ppo.roles import critic as critic_module


def two_adapters():
    """An actor that trains the first of two adapters, with a critic inside."""
    adapter = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny.tiny_actor(), adapter)
    model.add_adapter("other", adapter)
    critic = critic_module.ValueModel(tiny.tiny_reward_model())
    critic.attach(model.get_base_model(), None)
    return model, critic


@torch.no_grad()
def test_weights_to_generate_with_are_those_that_change_the_logits():
    """Each parameter is disturbed in turn: what is gathered is what the logits see, and nothing else."""
    model, critic = two_adapters()
    gathered = {id(parameter) for parameter in critic_module.generating_parameters(model, critic)}
    ids = torch.tensor([[1, 7, 8, 9, 10]])  # of the tokens that the embedding's disturbance reaches
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.linspace(0.5, 1.0, parameter.numel()).view_as(parameter))
        changed = not torch.equal(model(ids).logits, before)
        parameter.copy_(kept)
        assert changed == (id(parameter) in gathered), name


def test_whole_model_generates_with_all_that_is_not_the_critics():
    actor, critic = tiny.tiny_actor(), critic_module.ValueHead(16)
    names = {id(parameter): name for name, parameter in actor.named_parameters()}
    critic.attach(actor, None)
    assert {names[id(parameter)] for parameter in critic_module.generating_parameters(actor, critic)} == {
        *names.values()
    }


def test_base_that_the_critic_shares_is_the_actors():
    """A critic on the actor's base reaches the base's weights too, and has a head of its own."""
    actor = tiny.tiny_actor()
    names = {id(parameter): name for name, parameter in actor.named_parameters()}
    critic = torch.nn.ModuleDict({"base": actor.model, "score": torch.nn.Linear(16, 1)})
    actor.add_module("critic", critic)
    assert {names.get(id(p)) for p in critic_module.generating_parameters(actor, critic)} == {*names.values()}


def test_copy_is_a_copy_where_nothing_is_partitioned():
    model = tiny.tiny_reward_model()
    twin = sharding.copy_of(model)
    for (name, mine), (its_name, its) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert name == its_name
        assert mine is not its
        assert torch.equal(mine, its)


def with_functions_of_a_trainer(model):
    """What trainers leave in a model: a forward that calls the original one, bound to that model."""
    forward = model.forward

    def patched(self, *args, **kwargs):
        return forward(*args, **kwargs)

    model.forward = types.MethodType(patched, model)
    layer = model.model.layers[0].mlp
    layer.forward = functools.partial(type(layer).forward, model.model.layers[0].mlp)
    return model


@torch.no_grad()
def test_copy_computes_with_its_own_weights():
    model = with_functions_of_a_trainer(with_functions_of_a_trainer(tiny.tiny_actor()))
    ids = torch.tensor([[4, 5, 6]])
    before = model(input_ids=ids).logits
    twin = sharding.copy_of(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(input_ids=ids).logits, before)
    assert not model(input_ids=ids).logits.any()
    twin.lm_head.weight.zero_()
    assert not twin(input_ids=ids).logits.any()


@torch.no_grad()
def test_copy_keeps_functions_that_hold_on_to_nothing_else():
    """Such as a kernel put in place of a layer's forward."""
    model = tiny.tiny_actor()
    model.model.norm.forward = types.MethodType(lambda self, states: states * self.weight, model.model.norm)
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(sharding.copy_of(model)(input_ids=ids).logits, model(input_ids=ids).logits)


def test_partitioned_adapter_model_is_not_copied_into_an_empty_one():
    """A `PeftModel` has no class to make it from; `copy.deepcopy` would give it weights of no elements."""
    model, _ = two_adapters()
    next(model.parameters()).ds_id = 0
    assert sharding.is_partitioned(model)
    with pytest.raises(ValueError, match=r"Under ZeRO-3 a PeftModelForCausalLM cannot be copied.*`ref_model`"):
        sharding.copy_of(model)
    assert not sharding.is_partitioned(copy.deepcopy(tiny.tiny_actor()))
