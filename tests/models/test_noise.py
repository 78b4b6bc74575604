"""A model that is trained draws no random numbers, unless it is asked to."""

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

import dpo_runs
import ppo_runs
import tiny
from families.configs import member
from trl_ext.models.noise import disable_noise, has_noise, silence


FAMILIES = ["mixtral", "phimoe", "seed_oss", "xglm", "falcon", "gpt_neox_japanese"]
ADAPTERS = {
    "loha": LoHaConfig(target_modules=["q_proj"], rank_dropout=0.5, module_dropout=0.5, init_weights=False),
    "lora": LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False),
}


def noisy(name: str) -> nn.Module:
    if name in FAMILIES:
        return member(name, 0, noise=0.3).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(tiny.tiny_actor(), ADAPTERS[name])


def logps(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(7, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("name", [*FAMILIES, *ADAPTERS])
def test_training_mode_gives_what_evaluation_mode_gave(name):
    model = noisy(name)
    with torch.no_grad():
        expected = logps(model.eval())
        assert (logps(model.train()) - expected).abs().max() > 1e-2  # the control
        silence(model, name, lambda: logps(model), allowed=1e-4)
        for _ in range(2):
            assert torch.allclose(logps(model.train()), expected, atol=1e-5)
        assert torch.allclose(logps(model.eval()), expected, atol=1e-5)


def test_layers_that_are_computed_again_for_the_gradient_are_silent_too():
    gradients = []
    for checkpointing in (False, True):
        model = noisy("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        silence(model, "mixtral", lambda: logps(model), allowed=1e-4)  # noqa: B023
        logps(model.train())[..., 3].sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert dpo_runs.gradient_difference(*gradients) < 1e-5


class Layer(nn.Module):
    """Dropout in every form that transformers has."""

    def __init__(self):
        super().__init__()
        self.module = nn.Dropout(0.1)
        self.of_channels = nn.Dropout1d(0.1)
        self.attention_dropout = 0.2  # Llama, Mistral, Qwen
        self.dropout = 0.3  # OPT
        self.hidden_dropout_prob = 0.4
        self.layerdrop = 0.5  # OPT
        self.jitter_noise = 0.5  # Mixtral
        self.rank_dropout = {"default": 0.5}  # LoHa
        self.router_jitter_noise = 0.01  # Phi-MoE, a threshold
        self.dropped_tokens = 6
        self.scaling = 0.7


def test_noise_is_turned_off_in_every_form_that_is_a_number():
    layer = nn.Sequential(Layer())
    assert has_noise(layer)
    disable_noise(layer)
    inner = layer[0]
    assert inner.module.p == inner.of_channels.p == inner.rank_dropout["default"] == 0
    assert inner.attention_dropout == inner.dropout == inner.hidden_dropout_prob == inner.layerdrop == 0
    assert (inner.jitter_noise, inner.router_jitter_noise) == (0, 0.01)
    assert (inner.dropped_tokens, inner.scaling) == (6, 0.7)
    assert not has_noise(layer)


class Drifting(nn.Module):
    """Gives another answer at every call without drawing random numbers."""

    def __init__(self):
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()))
        self.embeddings = nn.Embedding(2, 2)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self):
        self.calls.data += 1
        return self.calls.detach().clone()


def test_noise_that_does_not_stop_is_refused_by_name():
    model = Drifting()
    with pytest.raises(ValueError, match=r"the model does not compute the same twice: .* differ by \d"):
        silence(model, "the model", model, allowed=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("name", ["mixtral", "seed_oss", "xglm"])
def test_dpo_starts_at_log_2_and_its_log_probs_are_those_of_the_model(tmp_path, name, precomputed):
    policy, reference = noisy(name), noisy(name)
    trainer = dpo_runs.dpo_run(
        tmp_path,
        {"model": policy, "ref_model": None if precomputed else reference.train()},
        max_steps=1,
        learning_rate=0.0,
        precompute_ref_log_probs=precomputed,
        router_aux_loss_coef=0.0,
    )
    (line,) = dpo_runs.lines(trainer)
    assert line["loss"] == pytest.approx(0.6931472, abs=1e-4)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with torch.no_grad():
        first = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        assert trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)) == pytest.approx(first.item())


def test_noise_of_the_trainer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha=5.0` adds noise .* ratio and KL"):
        ppo_runs.ppo_config(tmp_path, neftune_noise_alpha=5.0)
    with pytest.raises(ValueError, match=r"`neftune_noise_alpha=5.0` adds noise .* `disable_dropout=False`"):
        dpo_runs.dpo_config(tmp_path, neftune_noise_alpha=5.0)


def test_shared_rows_and_noise_that_is_wanted_do_not_go_together(tmp_path, caplog):
    dpo_runs.dpo_trainer(tmp_path, neftune_noise_alpha=5.0, disable_dropout=False)
    assert "Rows are padded for the actor, not packed: `neftune_noise_alpha` adds noise" in caplog.text


def test_rows_are_not_shared_where_noise_that_is_wanted_has_no_number_to_see(tmp_path, caplog):
    """Functional dropout, whatever its strength is called and wherever it stands."""
    model = dpo_runs.tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, args, output: nn.functional.dropout(output, 0.3, module.training))
    assert not has_noise(model)
    dpo_runs.dpo_trainer(tmp_path, {"model": model}, disable_dropout=False)
    assert "Rows are padded for the actor, not packed: dropout is active" in caplog.text
    caplog.clear()
    dpo_runs.dpo_trainer(tmp_path, disable_dropout=False)  # the control
    assert "not shared" not in caplog.text
