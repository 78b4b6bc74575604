"""A model reads packed rows as it reads each sequence on its own: groups of any size, padded on either side."""

import pytest
import torch

import dpo_runs
from families.configs import family_config, family_model
from trl_ext.models.scoring_head import trunk_of
from trl_ext.packing.forward import PackedForward


GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [torch.randint(3, 64, (size,), generator=GENERATOR).tolist() for size in (5, 1, 12)]
RESPONSES = [torch.randint(3, 64, (1 + i % 7,), generator=GENERATOR).tolist() for i in range(9)]
SEQUENCES = [(PROMPTS[i // 3], response) for i, response in enumerate(RESPONSES)]
GROUPS = {
    "three responses to a prompt": [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    "alone": [[i] for i in range(9)],
    "all in one": [[8, 0, 4, 1, 7, 2, 3, 5, 6]],
}


def batch():
    """PPO's layout: prompts padded on the left, responses on the right."""
    left, right = max(map(len, PROMPTS)), max(map(len, RESPONSES))
    ids, mask = torch.zeros(2, len(SEQUENCES), left + right, dtype=torch.long)
    for row, (prompt, response) in enumerate(SEQUENCES):
        own = slice(left - len(prompt), left + len(response))
        ids[row, own], mask[row, own] = torch.tensor(prompt + response), 1
    return ids, mask


def over_rows(model, groups, row_limit=None):
    """Last hidden states in the layout of the batch, and the rows."""
    packing, trunk = PackedForward(model, plain=None, packed=None), trunk_of(model)
    packing.piecewise = True
    packing.row_limit = row_limit
    rows = packing.lay_out(*batch(), groups)
    with packing.reading(trunk, rows) as kwargs:
        states = trunk(**kwargs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)[rows.packed_index], rows


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral_short_window", "gemma2", "gemma2_short_window"])
@torch.no_grad()
def test_states_over_rows_are_those_of_each_sequence_alone(name, groups):
    model = dpo_runs.tiny_model(name)
    states, rows = over_rows(model, GROUPS[groups])
    for (prompt, response), own, real in zip(SEQUENCES, states, batch()[1].bool(), strict=True):
        alone = trunk_of(model)(input_ids=torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(own[real], alone, rtol=1e-4, atol=1e-5)
    shared = {"three responses to a prompt": 2 * sum(map(len, PROMPTS))}.get(groups, 0)
    tokens = sum(segment.size for row in rows.rows for segment in row)
    assert tokens == sum(len(prompt) + len(response) for prompt, response in SEQUENCES) - shared


def test_rows_are_kept_within_a_limit_and_given_up_beyond_it():
    model, groups = dpo_runs.tiny_model(), GROUPS["three responses to a prompt"]
    largest = max(len(PROMPTS[i]) + sum(map(len, RESPONSES[3 * i : 3 * i + 3])) for i in range(3))
    with torch.no_grad():
        states, rows = over_rows(model, groups, row_limit=largest)
        expected, _ = over_rows(model, groups)
    assert len(rows.rows) > 1
    assert rows.input_ids.size(1) == largest
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)
    packing = PackedForward(model, plain=None, packed=None)
    packing.row_limit = largest - 1
    assert packing.lay_out(*batch(), groups) is None
    packing.row_limit, packing.limit = None, 12
    assert packing.lay_out(*batch(), groups) is None


def test_rows_that_save_no_token_are_padded(monkeypatch):
    """
    Sequences of one length, with columns of padding around all; a shorter one, or a shared prompt, is packed, and so
    is all under ZeRO-3, where another rank's batch may save some.
    """
    packing, alone = PackedForward(dpo_runs.tiny_model(), plain=None, packed=None), [[0], [1], [2]]
    packing.piecewise = True
    ids, mask = torch.randint(3, 64, (3, 8)), torch.zeros(3, 8, dtype=torch.long)
    ids[:, 1:4] = ids[0, 1:4].clone()
    mask[:, 1:7] = 1
    assert packing.lay_out(ids, mask, alone) is None
    assert packing.lay_out(ids, mask, [[0, 1, 2]]).input_ids.numel() == 12
    mask[1, 6] = 0
    assert packing.lay_out(ids, mask, alone).input_ids.numel() == 17
    mask[1, 6] = 1
    monkeypatch.setattr("trl_ext.packing.forward.is_partitioned", lambda model: True)
    assert packing.lay_out(ids, mask, alone).input_ids.numel() == 18


KNOWN = [("llama", True), ("gpt2", True), ("gpt_oss", True), ("hy_v4", False), ("falcon", False)]
KNOWN += [("deepseek_v32", False), ("doge", False), ("nemotron", False)]


@pytest.mark.parametrize("family, goes_piecewise", KNOWN)
def test_attention_of_a_partitioned_model_is_packed_where_transformers_knows_it(monkeypatch, family, goes_piecewise):
    """Nothing can be tried; some choose keys by an index, Nemotron's layers drop the rows, Falcon has no interface."""
    model = family_model(family_config(family))
    monkeypatch.setattr("trl_ext.packing.forward.is_partitioned", lambda model: True)
    packing = PackedForward(model, plain=None, packed=None)
    reason = packing.switch_on(by_mask=False)
    assert packing.on == packing.piecewise == goes_piecewise
    assert reason is None or "attention of its own, which reads whole rows" in reason
