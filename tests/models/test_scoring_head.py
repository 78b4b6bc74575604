"""Both trainers score what the model's own forward computes, whatever is between its trunk and its logits."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import dpo_runs
import ppo_runs
import tiny
from families.configs import family_config, family_model, member
from trl_ext import _trl
from trl_ext.models.scoring_head import ScoringHead


OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
FAMILIES = ["modernbert-decoder", "bert", "electra", "recurrent_gemma", "llama"]
OWN = {"modernbert-decoder", "bert", "electra"}


def family(name: str, dtype: torch.dtype = torch.float32, **overrides) -> nn.Module:
    """A lively tiny model: logits with a standard deviation of about 1 at least."""
    own_width = {"embedding_size": 8} if name == "electra" else {}
    model = family_model(family_config(name, **(own_width | overrides)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.get_output_embeddings().weight.data.normal_()
    return model.to(dtype)


def logits_by_hand(model: nn.Module, row: torch.Tensor) -> torch.Tensor:
    """(L, V) of one row of ids (1, L), by the model's own forward."""
    with torch.no_grad():
        return model(input_ids=row, use_cache=False).logits[0].float()


def rows_of_two_lengths() -> list[torch.Tensor]:
    return [torch.randint(7, 60, (1, length), generator=torch.Generator().manual_seed(length)) for length in (9, 6)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_statistic_is_that_of_the_models_own_logits(name, temperature):
    model = family(name)
    rows = rows_of_two_lengths()
    logits = [logits_by_hand(model, row)[:-1] / temperature for row in rows]
    _trl.add_fused_lm_head(model, temperature=temperature, outputs=OUTPUTS)
    head = ScoringHead(model, "model")
    head.settle()
    assert head.uses_own == (name in OWN)
    for row, expected in zip(rows, logits, strict=True):
        with torch.no_grad():
            output = model(input_ids=row, labels=row, fused_lm_head=True)
        p = expected.softmax(-1)
        target = row[0, 1:]
        assert torch.allclose(output.log_probs[0], p.log()[range(len(target)), target], atol=1e-5)
        assert torch.allclose(output.entropy[0], -(p * p.log()).sum(-1), atol=1e-5)
        assert torch.allclose(output.log_sum_sq_probs[0], (p * p).sum(-1).log(), atol=1e-5)
        assert torch.allclose(output.mean_logits[0], expected.mean(-1), atol=1e-5)
        assert torch.equal(output.is_top1[0], expected.argmax(-1) == target)


@pytest.mark.parametrize("name", ["modernbert-decoder", "recurrent_gemma"])
def test_control_trls_head_alone_is_wrong(name):
    model = family(name)
    (row, _) = rows_of_two_lengths()
    expected = logits_by_hand(model, row)[:-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    _trl.add_fused_lm_head(model)
    with torch.no_grad():
        assert (model(input_ids=row, labels=row, fused_lm_head=True).log_probs[0] - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", FAMILIES)
def test_head_maps_trunk_states_to_the_models_logits(name, caplog):
    model = family(name)
    (row, _) = rows_of_two_lengths()
    expected = logits_by_hand(model, row)
    _trl.add_fused_lm_head(model, temperature=0.7)
    head = ScoringHead(model, "model")
    head.settle()
    assert ("(which does not fit the states of its trunk)" in caplog.text) == (name == "electra")
    with torch.no_grad():
        states = head.trunk(input_ids=row, use_cache=False).last_hidden_state[0]
        assert torch.allclose(head.logits(states), expected / 0.7, atol=1e-5)


def test_load_balancing_loss_is_that_of_the_models_own_forward(caplog):
    """TRL reads `num_experts` of every config; Phimoe's has another name for it."""
    model = member("phimoe", 0)
    ids = torch.randint(7, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True}
    with torch.no_grad():
        expected = model(**asked, use_cache=False).aux_loss.item()
        _trl.add_fused_lm_head(model)
        head = ScoringHead(model, "model")
        with pytest.raises(AttributeError, match="num_experts"):  # the control
            model(**asked, labels=ids, fused_lm_head=True)
        head.settle()
        assert head.settle_aux_loss()
        assert model(**asked, labels=ids, fused_lm_head=True).aux_loss.item() == pytest.approx(expected, rel=1e-5)
    assert "leaves that loss out" in caplog.text


@pytest.mark.parametrize("name, has_loss", [("mixtral", True), ("doge", False)])
def test_load_balancing_loss_is_detected(name, has_loss, caplog):
    model = member(name, 0)
    _trl.add_fused_lm_head(model)
    head = ScoringHead(model, "model")
    head.settle()
    assert head.settle_aux_loss() == has_loss
    assert not head.uses_own
    assert "load-balancing" not in caplog.text


def test_load_balancing_loss_that_fails_is_refused_with_the_option(monkeypatch):
    model = member("mixtral", 0)
    monkeypatch.setattr(transformers.models.mixtral.modeling_mixtral, "load_balancing_loss_func", None)
    _trl.add_fused_lm_head(model)
    head = ScoringHead(model, "model")
    head.settle()
    with pytest.raises(ValueError, match=r"of MixtralForCausalLM \(`model`\) cannot be computed.*_coef=0\.0"):
        head.settle_aux_loss()


def test_error_of_a_mixtures_own_forward_is_shown_as_it_is(monkeypatch):
    """It is not that of its load-balancing loss."""
    model = member("mixtral", 0)
    monkeypatch.setattr(model.model.layers[0].mlp, "forward", lambda states: states @ states)
    _trl.add_fused_lm_head(model)
    head = ScoringHead(model, "model")
    head.settle()
    with pytest.raises(ValueError, match=r"The forward of MixtralForCausalLM .* fails at .*: RuntimeError: .*size"):
        head.settle_aux_loss()


def test_layers_between_trunk_and_projection_are_trained():
    """ModernBERT-decoder's dense layer never got a gradient."""
    model = family("modernbert-decoder")
    (row, _) = rows_of_two_lengths()
    own = model(input_ids=row, use_cache=False).logits[0, :-1].log_softmax(-1)
    own.gather(1, row[0, 1:, None]).sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert expected["lm_head.dense.weight"].abs().max() > 1e-3
    model.zero_grad()
    _trl.add_fused_lm_head(model)
    ScoringHead(model, "model").settle()
    model(input_ids=row, labels=row, fused_lm_head=True).log_probs.sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("name", ["modernbert-decoder", "recurrent_gemma", "llama"])
@pytest.mark.parametrize("weights, autocast", [(torch.float32, True), (torch.bfloat16, False)])
def test_rounding_to_16_bits_is_told_from_another_head(name, weights, autocast):
    model = family(name, weights)
    _trl.add_fused_lm_head(model)
    head = ScoringHead(model, "model")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        head.settle()
    assert head.uses_own == (name in OWN)


class Scaled(transformers.LlamaForCausalLM):
    """Logits that depend on more than the trunk's last state."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits * (1 + input_ids.size(1) / 10)
        return output


def test_logits_that_are_no_function_of_the_trunks_state_are_refused_by_name():
    model = Scaled(tiny.tiny_config()).eval()
    _trl.add_fused_lm_head(model)
    with pytest.raises(ValueError, match=r"Scaled \(`ref_model`\) reads the tokens that follow"):
        ScoringHead(model, "ref_model").settle()


class Shifted(transformers.LlamaForCausalLM):
    """The trunk's first layer speaks in the head as well."""

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids, output_hidden_states=True, **kwargs)
        output.logits = output.logits + self.lm_head(output.hidden_states[1])
        return output


def test_logits_of_two_layers_are_refused_with_the_size_of_the_difference():
    model = Shifted(tiny.tiny_config()).eval()
    _trl.add_fused_lm_head(model)
    with pytest.raises(ValueError, match=r"Shifted \(`model`\) cannot be scored: .* are 0.\d+ nats apart"):
        ScoringHead(model, "model").settle()


@pytest.mark.parametrize("name", ["bert", "electra"])
def test_model_that_sees_later_tokens_is_refused_by_name(name):
    model = family(name, is_decoder=False)
    _trl.add_fused_lm_head(model)
    with pytest.raises(ValueError, match=r"reads the tokens that follow: .* nats .*`is_decoder=True`"):
        ScoringHead(model, "model").settle()


def test_adapter_on_the_head_is_scored_and_trained(caplog):
    """TRL reads the weight that the adapter stands on."""
    model = get_peft_model(
        tiny.tiny_actor(), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    ).eval()
    (row, _) = rows_of_two_lengths()
    expected = logits_by_hand(model, row)[:-1].log_softmax(-1).gather(1, row[0, 1:, None])[:, 0]
    _trl.add_fused_lm_head(model.get_base_model())
    ScoringHead(model.get_base_model(), "model").settle()
    assert "nats apart, where rounding explains" in caplog.text
    output = model(input_ids=row, labels=row, fused_lm_head=True)
    assert torch.allclose(output.log_probs[0], expected, atol=1e-5)
    output.log_probs.sum().backward()
    assert model.get_parameter("base_model.model.lm_head.lora_A.default.weight").grad.abs().max() > 0


@pytest.mark.parametrize("run", [dpo_runs.dpo_trainer, ppo_runs.ppo_trainer])
def test_auxiliary_loss_that_the_model_does_not_have_is_an_error(tmp_path, run):
    """Llama 4's config has a coefficient, and its forward no such loss: left to the config it is left out."""
    model = family_model(family_config("llama4_text"))
    others = {"reward_model": None, "reward_funcs": ppo_runs.response_lengths} if run is ppo_runs.ppo_trainer else {}
    options = {"critic": "head"} if others else {}
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef=0\.01` .* of Llama4ForCausalLM .* Leave it out"):
        run(tmp_path, {"model": model, **others}, router_aux_loss_coef=0.01, **options)
    model = family_model(family_config("llama4_text", output_router_logits=True))
    assert run(tmp_path, {"model": model, **others}, **options).aux_loss_enabled is False


class WithBranch(nn.Module):
    """A head of two parts, of which the second is 0 at the start; its `weight` is the first's."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.weight = head.weight
        self.branch = nn.Linear(head.in_features, head.out_features, bias=False)
        nn.init.zeros_(self.branch.weight)
        self.bias = None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight) + self.branch(states)


def test_part_of_a_head_that_is_0_at_the_start_learns(caplog):
    model = family("llama")
    model.lm_head = WithBranch(model.lm_head)
    _trl.add_fused_lm_head(model)
    head = ScoringHead(model, "model")
    head.settle()
    assert head.uses_own
    assert "(its head has branch.weight beside a weight and a bias)" in caplog.text
    ids = torch.tensor([[4, 9, 8, 7]])
    model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    assert model.lm_head.branch.weight.grad.abs().max() > 0


def test_asking_leaves_mode_and_generator_as_they_were():
    model = family("modernbert-decoder").train()
    _trl.add_fused_lm_head(model)
    state = torch.get_rng_state()
    ScoringHead(model, "model", silent=True).settle()
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
