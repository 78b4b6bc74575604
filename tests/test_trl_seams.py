"""The seams to TRL: the supported range, the private names, and what is assumed about them."""

import re
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate import Accelerator
from torch import nn

import overrides
import tiny
from families.configs import member
from trl_ext import _trl


ROOT = Path(__file__).resolve().parents[1]


CAPPED_OR_SCALED = ["gemma2", "cohere", "granite"]  # their logits are more than a matrix times the states
ACTORS = ["llama", "gpt2", "qwen2", "mistral", *CAPPED_OR_SCALED]


# --- the range


@pytest.mark.parametrize("version", ["1.16.0", "1.16.3", "1.16.0.dev0"])
def test_supported_version_is_accepted(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    assert "FusedHead" in runpy.run_path(str(ROOT / "trl_ext" / "_trl.py"))


@pytest.mark.parametrize("version", ["1.15.2", "1.12.0", "1.17.0", "1.17.0.dev0", "2.0.0"])
def test_other_version_is_refused_with_the_way_out(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    message = f"trl>=1.16,<1.17; version {version} is installed. .*pip install 'trl>=1.16,<1.17'"
    with pytest.raises(ImportError, match=message):
        runpy.run_path(str(ROOT / "trl_ext" / "_trl.py"))


def test_range_is_the_one_that_the_package_declares():
    (declared,) = re.findall(r'"trl>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tuple(map(str, _trl.SUPPORTED)) == declared


# --- the hooks


HOOKS = [(trainer, name) for trainer in overrides.TRAINERS for name in sorted(overrides.overridden(trainer))]


@pytest.mark.parametrize("trainer, name", HOOKS)
def test_hook_takes_what_its_parent_takes(trainer, name):
    mine, its = (list(signature.parameters.values()) for signature in overrides.overridden(trainer)[name])
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in mine)
    own = [parameter for parameter in mine if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert len(own) == len(its) or (hands_on and len(own) < len(its))
    assert [parameter.name for parameter in own][2:] == [parameter.name for parameter in its][2 : len(own)]


# Private state of GRPO's, DPO's and the Trainer's that an override cannot do without.
TOUCHED = {
    "PPOTrainerX": {
        *("_step", "_last_loaded_step", "_tokenizer", "_signature_columns"),
        *("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs", "_current_train_step_time"),
        *("_env_tools", "_multi_environment", "_sync_tool_dicts", "_async_tool_dicts"),
    },
    "DPOTrainerX": {
        *("_metrics", "_tokenizer", "_signature_columns", "_is_vision_dataset", "_initial_global_step"),
        "_total_train_tokens",
    },
    "RewardTrainerX": {"_metrics", "_initial_global_step"},
}


@pytest.mark.parametrize("trainer", overrides.TRAINERS)
def test_private_state_that_is_touched_is_listed(trainer):
    assert overrides.touched(trainer) == TOUCHED[trainer]


# --- the fused head


@pytest.mark.parametrize("name", ACTORS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_of_the_fused_head_are_the_models_own(name, temperature):
    model = member(name, 0)
    ids = torch.randint(7, 60, (2, 11))
    with torch.no_grad():
        own = model(ids).logits / temperature
        states = model.base_model(ids).last_hidden_state
        _trl.add_fused_lm_head(model, temperature=temperature)
        logits = _trl.FusedHead(model).logits(states.flatten(0, 1)).view_as(own)
    torch.testing.assert_close(logits, own, rtol=1e-5, atol=1e-5)
    assert own.std() > 1e-3


@pytest.mark.parametrize("name", CAPPED_OR_SCALED)
def test_control_plain_head_gives_other_logits(name):
    model = member(name, 0)
    ids = torch.randint(7, 60, (2, 11))
    with torch.no_grad():
        plain = model.get_output_embeddings()(model.base_model(ids).last_hidden_state)
        assert (plain - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("name, soft_cap, scale", [("gemma2", 3.0, 1.0), ("cohere", None, 0.5), ("llama", None, 1.0)])
def test_fused_head_is_seen_with_what_it_was_given(name, soft_cap, scale):
    model = member(name, 0)
    seen = []
    model.base_model.register_forward_pre_hook(lambda *_: seen.append(1))
    _trl.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "is_top1"))
    head = _trl.FusedHead(model)
    assert (head.temperature, head.outputs) == (0.7, ("log_probs", "is_top1"))
    assert (head.soft_cap, head.scale) == (soft_cap, scale)
    assert not seen
    assert model.base_model is model.model


def renamed(ctx, hidden, weight, bias, targets, inv_t, chunk_size, final_logit_softcapping, logit_scale, outputs):
    """The kernel's `forward` with another parameter in place of the temperature."""


def test_fused_head_of_another_trl_is_an_error(monkeypatch):
    model = tiny.tiny_actor()
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has no fused head of TRL's"):
        _trl.FusedHead(model)
    assert model.base_model is model.model
    _trl.add_fused_lm_head(model)
    with monkeypatch.context() as patch:
        patch.setattr(_trl.trl_utils._ChunkedLogProbFunction, "forward", staticmethod(renamed))
        with pytest.raises(RuntimeError, match=r"'inv_t'.* is what trl_ext knows\. Install a supported TRL"):
            _trl.FusedHead(model)
    model.forward = lambda **_: None  # a head with a kernel of another name
    with pytest.raises(RuntimeError, match="LlamaForCausalLM has no fused head of TRL's, or one that no longer"):
        _trl.FusedHead(model)
    assert model.base_model is model.model


# --- vLLM's weight sync


def test_only_the_given_submodules_are_left_out_and_only_while_parameters_are_walked():
    def linear(**children):
        module = nn.Linear(1, 1, bias=False)
        for name, child in children.items():
            module.add_module(name, child)
        return module

    reward = linear()
    owner = linear(critic=linear(), criticism=linear(), trunk=linear(critic=linear(), reward=reward))
    generation = SimpleNamespace(model=owner, _iter_named_params=owner.named_parameters)
    _trl.exclude_from_weight_sync(generation, owner.critic, reward)
    walk = generation._iter_named_params()
    next(walk)
    assert "critic" not in dict(owner.named_children())
    assert [name for name, _ in walk] == ["criticism.weight", "trunk.weight", "trunk.critic.weight"]
    assert list(dict(owner.named_children())) == ["critic", "criticism", "trunk"]
    assert owner.trunk.reward is reward


def test_submodule_is_back_when_sending_breaks_off():
    owner = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    generation = SimpleNamespace(model=owner, _iter_named_params=owner.named_parameters)
    _trl.exclude_from_weight_sync(generation, owner[1])
    walk = generation._iter_named_params()
    next(walk)
    assert len(owner) == 1
    walk.close()
    assert len(owner) == 2


# --- generation under ZeRO-3


class Writer(nn.Module):
    def generate(self, synced_gpus=None):
        return f"the class's, {synced_gpus}"


@pytest.mark.parametrize("is_replaced", [False, True])
def test_gathered_model_has_its_own_generate_again_afterwards(monkeypatch, is_replaced):
    for hooks in ("add_hooks", "remove_hooks"):
        monkeypatch.setattr(_trl, hooks, lambda engine: None)
    monkeypatch.setattr(_trl, "disable_gradient_checkpointing", lambda *_: nullcontext())
    model, says = Writer(), "the class's"
    if is_replaced:
        model.generate, says = (lambda synced_gpus=None: f"the user's, {synced_gpus}"), "the user's"
    with _trl.gathered_for_generation(model, SimpleNamespace(unwrap_model=lambda engine: engine), [], None):
        assert model.generate() == f"{says}, False"
    assert model.generate() == f"{says}, None"


# --- frozen models


def test_frozen_model_is_in_evaluation_mode_without_gradients():
    model = tiny.tiny_actor().train()
    frozen = _trl.prepare_frozen(model, Accelerator(cpu=True))
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
