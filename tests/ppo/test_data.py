"""Prompts: text, conversations, token ids used as they are, a collator, streams; and where a response ends."""

import copy
import pickle

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

import tiny
from plain import plain_logps
from ppo_runs import ppo_run, ppo_trainer, returned_by, sequences
from trl_ext.ppo.data import TokenisedPrompt, WholeStream, unpadded, with_tokenised_prompts


def tokens():
    return tiny.tiny_tokenizer()


def prompts_of(rollout):
    return [prompt for prompt, _ in sequences(rollout)]


def tokenised_prompts(size=8):
    """Ids that decoding and encoding would change: special tokens in the middle, an unknown word."""
    rows = [[1, 5, 7 + i, 3, 6, 20 + i][: 2 + i % 5] for i in range(size)]
    return Dataset.from_dict({"input_ids": rows})


@pytest.mark.parametrize("remake", [copy.copy, copy.deepcopy, lambda prompt: pickle.loads(pickle.dumps(prompt))])
def test_tokenised_prompt_is_copied_with_its_ids(remake):
    again = remake(TokenisedPrompt("the cat", [10, 11]))
    assert (again, again.input_ids, type(again)) == ("the cat", [10, 11], TokenisedPrompt)


@pytest.mark.parametrize("collate", [False, True])
def test_token_ids_are_used_as_they_are(tmp_path, collate):
    data = tokenised_prompts(4)
    collator = DataCollatorWithPadding(tokens()) if collate else None
    trainer = ppo_run(tmp_path, {"train_dataset": data, "data_collator": collator}, max_steps=1)
    assert sorted(prompts_of(trainer.run_state.rollout)) == sorted(data["input_ids"])
    retokenised = tokens()(tokens().batch_decode(data["input_ids"][:], skip_special_tokens=True))["input_ids"]
    assert sorted(retokenised) != sorted(data["input_ids"])  # the control: through text they would be others


BARE = [[7, 8, 9], [10], [11, 12, 13, 14, 15], [20, 21]]


def padded(side, pad, rows=BARE, width=6):
    """The rows at one width, and their masks."""
    fills = [[pad] * (width - len(row)) for row in rows]
    masks = [[0] * len(fill) + [1] * len(row) for fill, row in zip(fills, rows, strict=True)]
    if side == "left":
        return [fill + row for fill, row in zip(fills, rows, strict=True)], masks
    return [row + fill for fill, row in zip(fills, rows, strict=True)], [mask[::-1] for mask in masks]


@pytest.mark.parametrize("collate", [False, True], ids=["rows", "collated"])
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_padding_of_token_ids_is_taken_off(pad, side, with_mask, collate):
    tokenizer = tokens()
    tokenizer.pad_token = pad or "<eos>"  # what people pad with
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8) if collate else None
    ids, masks = padded(side, tokenizer.pad_token_id)
    columns = {"input_ids": ids, "label": [1, 2, 3, 4]} | ({"attention_mask": masks} if with_mask else {})
    rows = with_tokenised_prompts(
        Dataset.from_dict(columns).to_list(), tokenizer, collator, pad and tokenizer.pad_token_id
    )
    assert [row["prompt"].input_ids for row in rows] == BARE
    assert [{**row, "prompt": str(row["prompt"])} for row in rows] == [
        {"label": i + 1, "prompt": tokenizer.decode(ids)} for i, ids in enumerate(BARE)
    ]


def test_ids_of_a_dataset_in_a_format_of_tensors_are_numbers():
    rows = Dataset.from_dict({"input_ids": [[0, 5, 6]], "attention_mask": [[0, 1, 1]]}).with_format("torch")
    for row in (rows[0], {"input_ids": rows[0]["input_ids"]}):
        ids = unpadded(row, 0, 2)
        assert ids == [5, 6]
        assert {type(id_) for id_ in ids} == {int}


def test_mask_decides_what_a_pad_token_is_and_end_tokens_within_a_prompt_stay():
    ids = [2, 0, 7, 2, 8, 2]
    assert unpadded({"input_ids": ids}, 0, 2) == [2, 7, 2, 8, 2]
    assert unpadded({"input_ids": ids}, 2, 2) == [0, 7, 2, 8]  # as TRL 1.12 at the ends
    assert unpadded({"input_ids": ids}, None, 2) == [0, 7, 2, 8]  # where there is no pad token, as usual
    assert unpadded({"input_ids": ids, "attention_mask": [1] * 6}, 0, 2) == ids
    assert unpadded({"input_ids": ids, "attention_mask": [0, 1, 1, 0, 1, 1]}, 0, 2) == [0, 7, 8, 2]
    assert unpadded({"input_ids": ids, "attention_mask": None}, 0, 2) == [2, 7, 2, 8, 2]
    with pytest.raises(ValueError, match="6 tokens in `input_ids` and 2 in `attention_mask`"):
        unpadded({"input_ids": ids, "attention_mask": [1, 1]}, 0, 2)


@pytest.mark.parametrize("side, with_mask, collate", [("left", False, False), ("right", True, False), ("left", 0, 1)])
def test_padded_prompts_are_scored_as_bare_ones(tmp_path, side, with_mask, collate):
    """In training and in evaluation; log-probabilities are those of a plain forward pass of the bare ids."""
    ids, masks = padded(side, 0)
    data = Dataset.from_dict({"input_ids": ids} | ({"attention_mask": masks} if with_mask else {}))
    seen = []

    def note(prompt_ids, **kwargs):
        seen.extend(prompt_ids)
        return [0.0] * len(prompt_ids)

    models = {"train_dataset": data, "eval_dataset": data, "reward_model": None, "reward_funcs": note}
    models["data_collator"] = DataCollatorWithPadding(tokens()) if collate else None
    trainer = ppo_run(tmp_path, models, max_steps=1, eval_strategy="steps", eval_steps=1, num_mini_batches=2)
    assert len(seen) > 4
    assert {tuple(row) for row in seen} == {tuple(row) for row in BARE}
    rollout, temperature = trainer.run_state.rollout, trainer.args.temperature
    for row, ids in enumerate(sequences(rollout)):
        with torch.no_grad():
            expected = plain_logps(tiny.tiny_actor(), *ids, temperature)
        torch.testing.assert_close(rollout.old_logps[row][rollout.attended[row]], expected, rtol=1e-4, atol=1e-5)


def test_pad_token_beyond_the_embedding_is_taken_off_too(tmp_path):
    """As in scripts for TRL 1.12, which add "[PAD]" to the tokenizer and not to the model."""
    tokenizer = tokens()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    ids, _ = padded("left", tokenizer.pad_token_id)
    models = {"train_dataset": Dataset.from_dict({"input_ids": ids}), "processing_class": tokenizer}
    trainer = ppo_run(tmp_path, models, max_steps=1)
    assert sorted(prompts_of(trainer.run_state.rollout)) == sorted(BARE)


@pytest.mark.parametrize("with_mask", [True, False])
def test_collator_is_honoured_and_its_padding_is_taken_off(tmp_path, with_mask):
    """A collator that keeps the last two tokens and pads on either side."""
    calls = []

    def last_two(rows):
        calls.append(len(rows))
        ids = torch.tensor([[0, *row["input_ids"][-2:], 0] for row in rows])
        return {"input_ids": ids} | ({"attention_mask": (ids != 0).long()} if with_mask else {})

    data = tokenised_prompts(4)
    trainer = ppo_run(tmp_path, {"train_dataset": data, "data_collator": last_two}, max_steps=1)
    assert sorted(prompts_of(trainer.run_state.rollout)) == sorted(row[-2:] for row in data["input_ids"])
    assert calls == [4]


def test_reward_function_sees_the_text_and_the_columns_of_tokenised_prompts(tmp_path):
    seen = {}

    def grade(prompts, completions, label, **kwargs):
        seen.update(zip(label, prompts, strict=True))
        return [0.0] * len(prompts)

    data = Dataset.from_dict({"input_ids": [[1, 7], [8, 3], [9, 2, 10], [11, 5]], "label": ["a", "b", "c", "d"]})
    ppo_run(tmp_path, {"train_dataset": data, "reward_model": None, "reward_funcs": grade}, max_steps=1)
    assert seen == {"a": "zero", "b": "one", "c": "two three", "d": "four"}


def test_responses_are_sampled_anew_for_every_rollout_from_the_next_prompts(tmp_path):
    data = tiny.tiny_prompts(8)
    trainer = ppo_trainer(tmp_path, {"train_dataset": data})
    rollouts = returned_by(trainer, "_collect_rollout")
    trainer.train()
    assert len(rollouts) == 2
    seen = [prompt for rollout in rollouts for prompt in prompts_of(rollout)]
    assert sorted(seen) == sorted(tokens()(data["prompt"][:])["input_ids"])  # each once


@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffling_can_be_switched_off(tmp_path, shuffled):
    data = tiny.tiny_prompts(8)
    trainer = ppo_run(tmp_path, {"train_dataset": data}, max_steps=1, shuffle_dataset=shuffled)
    in_order = tokens()(data["prompt"][:4])["input_ids"]
    assert (prompts_of(trainer.run_state.rollout) == in_order) is not shuffled


def test_collator_is_refused_for_a_stream_of_text_when_it_first_shows(tmp_path):
    models = {"train_dataset": tiny.tiny_prompts(8).to_iterable_dataset(), "data_collator": lambda rows: rows}
    trainer = ppo_trainer(tmp_path, models)
    with pytest.raises(ValueError, match=r"`data_collator` .* the stream has no column `input_ids` but \['prompt'\]"):
        trainer.train()


def test_response_ends_at_any_declared_end_token_unless_told_otherwise(tmp_path):
    """The actor declares token 9 as an end beside the tokenizer's eos."""

    def actor():
        model = tiny.tiny_actor()
        model.generation_config.eos_token_id = [2, 9]
        return model

    options = {"max_steps": 1, "response_length": 40, "per_device_train_batch_size": 8, "temperature": 2.0}

    def ends(**stop):
        rollout = ppo_run(tmp_path, {"model": actor()}, **options, **stop).run_state.rollout
        responses = [response for _, response in sequences(rollout)]
        last = {response[-1] for response, ended in zip(responses, rollout.has_eos, strict=True) if ended}
        # What ends no response is followed by more than padding.
        inside = {
            token for response in responses for place, token in enumerate(response) if any(response[place + 1 :])
        }
        return last, inside & {2, 9, 11}

    assert ends() == ({2, 9}, {11})
    assert ends(stop_token="eos") == ({2}, {9, 11})
    assert ends(stop_token_id=11) == ({11}, {2, 9})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("column, cell", [("tools", '[{"name": "look"}]'), ("chat_template_kwargs", {"think": False})])
def test_options_of_each_row_are_refused_where_a_template_would_read_them(tmp_path, column, cell, stream):
    """They would silently be left out of the prompt."""

    def data(value, **kind):
        rows = tiny.tiny_prompts(4, **kind).to_list()
        return Dataset.from_list([row | {column: value} for row in rows])

    chats = data(cell, conversational=True)
    chats = chats.to_iterable_dataset() if stream else chats
    with pytest.raises(ValueError, match=rf"`train_dataset` has the column `{column}`, .*`chat_template_kwargs` in"):
        ppo_trainer(tmp_path, {"train_dataset": chats})
    for harmless in (data(cell), data(None, conversational=True)):  # text has no template
        ppo_trainer(tmp_path, {"train_dataset": harmless.to_iterable_dataset() if stream else harmless})


# --- streams


def batches_of(stream, rank):
    """The prompts that one of two processes takes, in batches of two."""
    loader = DataLoader(stream, batch_size=2, collate_fn=lambda rows: [row["prompt"] for row in rows])
    return list(prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False))


def test_processes_take_turns_in_one_stream_however_many_shards_it_has(tmp_path):
    """accelerate would give each its own shards, here of four and of two prompts."""
    rows = tiny.tiny_prompts(6).to_iterable_dataset(num_shards=3)
    prompts = [row["prompt"] for row in rows]
    stream = WholeStream(rows)
    assert batches_of(stream, 0) == [prompts[:2], prompts[4:]]
    assert batches_of(stream, 1) == [prompts[2:4], prompts[:2]]  # the last batch is filled up
    assert stream.num_rows == 6
    assert [len(batches_of(rows, rank)) for rank in (0, 1)] == [2, 1]  # the control
    trainer = ppo_trainer(tmp_path, {"train_dataset": rows}, max_steps=1)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader(rows)):
        assert isinstance(loader.dataset, WholeStream)
