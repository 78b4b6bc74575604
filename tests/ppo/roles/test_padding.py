"""Each model reads left-padded rows as it reads them alone, whatever the actor is."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import ppo_runs
import tiny
from families.configs import family_config, family_model, member
from plain import plain_logps
from trl_ext.ppo.roles.padding import LeftPadding


@pytest.mark.integration
@pytest.mark.parametrize("actor, other", [("bloom", "gpt2"), ("gpt2", "bloom"), ("gpt2", "gpt2")])
def test_critic_reward_model_and_reference_are_read_as_without_padding(tmp_path, monkeypatch, actor, other):
    models = {
        "model": member(actor, 0),
        "ref_model": member(other, 1),
        "reward_model": member(other, 2, of=AutoModelForSequenceClassification),
        "value_model": member(other, 3, of=AutoModelForSequenceClassification),
    }
    trainer = ppo_runs.ppo_trainer(tmp_path, models, max_steps=1, num_ppo_epochs=1, kl_placement="reward")
    seen = []
    score = trainer._score_with_models
    monkeypatch.setattr(trainer, "_score_with_models", lambda part: score(part) or seen.append(part))
    trainer.train()
    (part,) = seen
    assert not part.prompt_mask.all()  # some prompt is padded
    policy, reference = member(actor, 0), member(other, 1)
    critic = member(other, 3, of=AutoModelForSequenceClassification)
    for row, (prompt, response) in enumerate(ppo_runs.sequences(part)):
        size = len(response)
        with torch.no_grad():
            states = critic.base_model(torch.tensor([prompt + response])).last_hidden_state
            values = critic.score(states)[0, len(prompt) - 1 : -1, 0]
            logps, refs = (plain_logps(model, prompt, response) for model in (policy, reference))
        assert torch.allclose(part.old_values[row, :size], values, atol=1e-4)
        assert torch.allclose(part.old_logps[row, :size], logps, atol=1e-4)
        assert torch.allclose(part.ref_logps[row, :size], refs, atol=1e-4)


def padded_rows() -> dict[str, torch.Tensor]:
    ids = torch.randint(7, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def test_model_with_an_offset_in_its_positions_counts_them_itself():
    """RoBERTa's first position is that of the pad token and one."""
    model = member("roberta", 0).base_model
    rows = padded_rows()
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"][1:, 4:]).last_hidden_state[0]
        told = LeftPadding(model, "it").inputs(rows)
        assert torch.allclose(model(**told).last_hidden_state[1, 4:], expected, atol=1e-5)
        assert (model(**rows).last_hidden_state[1, 4:] - expected).abs().max() > 1e-2  # the control


@pytest.mark.parametrize("own, actors", [(0, 2), (5, 0)])
def test_model_whose_pad_token_is_another_than_the_actors_counts_from_its_own(own, actors):
    """RoBERTa counts from the ids that are not its pad token, whatever the mask says."""
    model = family_model(family_config("roberta", pad_token_id=own)).base_model
    rows = padded_rows()
    rows["input_ids"][1, :4] = actors
    with torch.no_grad():
        expected = model(input_ids=rows["input_ids"][1:, 4:]).last_hidden_state[0]
        told = LeftPadding(model, "it").inputs(rows)
        assert torch.allclose(model(**told).last_hidden_state[1, 4:], expected, atol=1e-5)


def bart():
    return family_model(family_config("bart", is_encoder_decoder=False))


@pytest.mark.parametrize("make", [bart, lambda: member("rwkv", 0)], ids=["bart", "rwkv"])
def test_model_that_reads_padding_is_refused_when_there_is_some(make):
    model = make()
    padding = LeftPadding(model.base_model, "it (`model`)")
    rows = padded_rows()
    padding.inputs({name: value[:1] for name, value in rows.items()})  # no padding, no error
    with pytest.raises(ValueError, match=r"it \(`model`\) reads the padding .*prompts of one length"):
        padding.inputs(rows)


@pytest.mark.integration
def test_ppo_of_such_a_model_stops_before_a_step_unless_prompts_are_of_one_length(tmp_path):
    models = {"model": bart(), "reward_model": None, "reward_funcs": ppo_runs.response_lengths}
    with pytest.raises(ValueError, match="reads the padding of shorter prompts"):
        ppo_runs.ppo_run(tmp_path, models, critic="head", max_steps=1)
    even = tiny.tiny_prompts(16).map(lambda row: {"prompt": "one two three"})
    trainer = ppo_runs.ppo_run(tmp_path, models | {"train_dataset": even}, critic="head", max_steps=1)
    assert trainer.state.global_step == 1


def test_model_that_selects_keys_reads_no_padded_row_longer_than_its_selection():
    """Equal tokens have equal scores, and which of them is selected depends on the length of the row."""
    model = member("doge", 0).base_model
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
