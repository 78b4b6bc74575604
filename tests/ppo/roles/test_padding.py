"""Each model reads left-padded rows as it reads them alone, whatever the actor is."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    BloomForSequenceClassification,
    DogeConfig,
    DogeForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import ppo_runs
import tiny
from trl_ext.ppo.roles.padding import LeftPadding


IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
GPT2 = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5, **IDS)
BLOOM = BloomConfig(hidden_size=16, n_layer=2, n_head=2, initializer_range=0.5, **IDS)
USUAL = IDS | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
PAIRS = {"bloom": (BloomForCausalLM, BLOOM), "gpt2": (GPT2LMHeadModel, GPT2)}
CLASSIFIERS = {"bloom": (BloomForSequenceClassification, BLOOM), "gpt2": (GPT2ForSequenceClassification, GPT2)}


def made(kind: type, config, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config).eval()


def alone(part, row):
    """Ids of one sequence of a rollout without padding, and how many are the prompt's."""
    prompt = part.prompt_ids[row][part.prompt_mask[row].bool()]
    response = part.response_ids[row][part.attended[row].bool()]
    return torch.cat([prompt, response])[None], len(prompt)


@pytest.mark.integration
@pytest.mark.parametrize("actor, other", [("bloom", "gpt2"), ("gpt2", "bloom"), ("gpt2", "gpt2")])
def test_critic_reward_model_and_reference_are_read_as_without_padding(tmp_path, monkeypatch, actor, other):
    actor_kind, config = PAIRS[actor]
    kind, other_config = CLASSIFIERS[other]
    models = {
        "model": made(actor_kind, config),
        "ref_model": made(*PAIRS[other], seed=1),
        "reward_model": made(kind, other_config, seed=2),
        "value_model": made(kind, other_config, seed=3),
    }
    trainer = ppo_runs.ppo_trainer(tmp_path, models, max_steps=1, num_ppo_epochs=1, kl_placement="reward")
    seen = []
    score = trainer._score_with_models
    monkeypatch.setattr(trainer, "_score_with_models", lambda part: score(part) or seen.append(part))
    trainer.train()
    (part,) = seen
    assert not part.prompt_mask.all()  # some prompt is padded
    critic, reference = made(kind, other_config, seed=3), made(*PAIRS[other], seed=1)
    policy = made(actor_kind, config)
    for row in range(len(part)):
        ids, start = alone(part, row)
        size = ids.size(1) - start
        with torch.no_grad():
            values = critic.score(critic.base_model(ids).last_hidden_state)[0, start - 1 : -1, 0]
            logps, refs = (
                model(ids).logits.log_softmax(-1)[0, start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
                for model in (policy, reference)
            )
        assert torch.allclose(part.old_values[row, :size], values, atol=1e-4)
        assert torch.allclose(part.old_logps[row, :size], logps, atol=1e-4)
        assert torch.allclose(part.ref_logps[row, :size], refs, atol=1e-4)


def padded_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(7, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_model_that_counts_from_another_number_is_not_told_positions():
    """RoBERTa's first position is that of the pad token and one."""
    config = RobertaConfig(is_decoder=True, max_position_embeddings=64, initializer_range=0.5, **USUAL)
    model = made(RobertaForCausalLM, config).base_model
    rows = padded_rows()
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"][1:, 4:]).last_hidden_state[0]
        told = LeftPadding(model, "it").inputs(rows)
        assert torch.allclose(model(**told).last_hidden_state[1, 4:], expected, atol=1e-5)
        assert (model(**rows).last_hidden_state[1, 4:] - expected).abs().max() > 1e-2  # the control


@pytest.mark.parametrize("own, actors", [(0, 2), (5, 0)])
def test_model_whose_pad_token_is_another_than_the_actors_counts_from_its_own(own, actors):
    """RoBERTa counts from the ids that are not its pad token, whatever the mask says."""
    config = RobertaConfig(
        is_decoder=True, max_position_embeddings=64, initializer_range=0.5, **(USUAL | {"pad_token_id": own})
    )
    model = made(RobertaForCausalLM, config).base_model
    rows = padded_rows()
    rows["input_ids"][1, :4] = actors
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"][1:, 4:]).last_hidden_state[0]
        told = LeftPadding(model, "it").inputs(rows)
        assert torch.allclose(model(**told).last_hidden_state[1, 4:], expected, atol=1e-5)


RWKV = RwkvConfig(hidden_size=16, num_hidden_layers=2, context_length=64, **IDS)
BART = BartConfig(
    d_model=16,
    decoder_layers=2,
    decoder_attention_heads=2,
    decoder_ffn_dim=32,
    max_position_embeddings=64,
    is_decoder=True,
    init_std=0.5,
    **IDS,
)


@pytest.mark.parametrize("kind, config", [(BartForCausalLM, BART), (RwkvForCausalLM, RWKV)])
def test_model_that_reads_padding_is_refused_when_there_is_some(kind, config):
    model = made(kind, config)
    if kind is RwkvForCausalLM:
        model.rwkv.embeddings.weight.data.normal_()
    padding = LeftPadding(model.base_model, f"{kind.__name__} (`model`)")
    rows = padded_rows()
    padding.inputs({name: value[:1] for name, value in rows.items()})  # no padding, no error
    with pytest.raises(ValueError, match=rf"{kind.__name__} \(`model`\) reads the padding .*prompts of one length"):
        padding.inputs(rows)


@pytest.mark.integration
def test_ppo_of_such_a_model_stops_before_a_step_unless_prompts_are_of_one_length(tmp_path):
    models = {"model": made(BartForCausalLM, BART), "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    with pytest.raises(ValueError, match="reads the padding of shorter prompts"):
        ppo_runs.ppo_run(tmp_path, models, critic="head", max_steps=1)
    even = tiny.tiny_prompts(16).map(lambda row: {"prompt": "one two three"})
    trainer = ppo_runs.ppo_run(tmp_path, models | {"train_dataset": even}, critic="head", max_steps=1)
    assert trainer.state.global_step == 1


def test_model_that_selects_keys_reads_no_padded_row_longer_than_its_selection():
    """Equal tokens score alike, and which of them is selected hangs on the row's length."""
    model = made(
        DogeForCausalLM, DogeConfig(keep_window_size=6, head_dim=8, initializer_range=0.5, **USUAL)
    ).base_model
    for layer in model.layers:
        layer.self_attn.A.data.fill_(-0.5)
    rows = padded_rows()
    rows["input_ids"][1, 4:] = torch.tensor([7, 8, 7, 8, 7])
    longer = {name: torch.nn.functional.pad(value, (7, 0)) for name, value in rows.items()}
    repeated = torch.tensor([[7, 8, 9] * 4])
    beside = torch.nn.functional.pad(repeated, (0, 7))
    with torch.no_grad():
        alone = model(input_ids=repeated).last_hidden_state
        padded = model(input_ids=beside, attention_mask=(beside != 0).long()).last_hidden_state[:, :12]
    assert (padded - alone).abs().max() > 1e-2  # transformers' own: there is nothing to be equal to
    padding = LeftPadding(model, "DogeForCausalLM (`model`)")
    padding.inputs({name: value[:, 3:] for name, value in rows.items()})  # as long as the selection
    padding.inputs({name: value[:1] for name, value in rows.items()})  # without padding
    for each in (rows, longer):
        with pytest.raises(ValueError, match=r"Doge.* selects 6 tokens .*`keep_window_size`.* together within 6"):
            padding.inputs(each)
