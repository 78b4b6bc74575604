"""Prompts: text, conversations, token ids used as they are, a collator, streams; and where a response ends."""

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithPadding

import tiny
from ppo_runs import logged, ppo_run, ppo_trainer


def tokens():
    return tiny.tiny_tokenizer()


def prompts_of(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]


def tokenised_prompts(size=8):
    """Ids that no text gives back: special tokens in the middle, and the id of an unknown word."""
    rows = [[1, 5, 7 + i, 3, 6, 20 + i][: 2 + i % 5] for i in range(size)]
    return Dataset.from_dict({"input_ids": rows})


def test_text_prompts_are_tokenised(tmp_path):
    data = tiny.tiny_prompts(4)
    trainer = ppo_run(tmp_path, {"train_dataset": data}, max_steps=1)
    assert sorted(prompts_of(trainer._rollout)) == sorted(tokens()(data["prompt"][:])["input_ids"])


def test_conversations_are_rendered_with_the_chat_template_and_open_the_answer(tmp_path):
    data = tiny.tiny_prompts(4, conversational=True)
    trainer = ppo_run(tmp_path, {"train_dataset": data}, max_steps=1)
    texts = [f"<user> {row[0]['content']} <eos> <assistant>" for row in data["prompt"]]
    assert sorted(prompts_of(trainer._rollout)) == sorted(tokens()(texts)["input_ids"])


@pytest.mark.parametrize("collate", [False, True])
def test_token_ids_are_used_as_they_are(tmp_path, collate):
    data = tokenised_prompts(4)
    collator = DataCollatorWithPadding(tokens()) if collate else None
    trainer = ppo_run(tmp_path, {"train_dataset": data, "data_collator": collator}, max_steps=1)
    assert sorted(prompts_of(trainer._rollout)) == sorted(data["input_ids"])
    retokenised = tokens()(tokens().batch_decode(data["input_ids"][:], skip_special_tokens=True))["input_ids"]
    assert sorted(retokenised) != sorted(data["input_ids"])  # the control: through text they would be others


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
    assert sorted(prompts_of(trainer._rollout)) == sorted(row[-2:] for row in data["input_ids"])
    assert calls == [4]


def test_reward_function_sees_the_text_and_the_columns_of_tokenised_prompts(tmp_path):
    seen = {}

    def grade(prompts, completions, label, **kwargs):
        seen.update(zip(label, prompts, strict=True))
        return [0.0] * len(prompts)

    data = Dataset.from_dict({"input_ids": [[1, 7], [8, 3], [9, 2, 10], [11, 5]], "label": ["a", "b", "c", "d"]})
    ppo_run(tmp_path, {"train_dataset": data, "reward_model": None, "reward_funcs": grade}, max_steps=1)
    assert seen == {"a": "zero", "b": "one", "c": "two three", "d": "four"}


def test_held_out_prompts_may_be_tokenised_too(tmp_path):
    models = {"train_dataset": tokenised_prompts(8), "eval_dataset": tokenised_prompts(3)}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    seen = []
    collect = trainer._collect_held_out

    def keep(rows):
        rollout = collect(rows)
        seen.extend(prompts_of(rollout))
        return rollout

    trainer._collect_held_out = keep
    trainer.evaluate()
    assert sorted(seen) == sorted(tokenised_prompts(3)["input_ids"])


def test_responses_are_sampled_anew_for_every_rollout_from_the_next_prompts(tmp_path):
    data = tiny.tiny_prompts(8)
    trainer = ppo_trainer(tmp_path, {"train_dataset": data})
    seen = []
    collect = trainer._collect_rollout

    def keep(rows):
        rollout = collect(rows)
        seen.extend(prompts_of(rollout))
        return rollout

    trainer._collect_rollout = keep
    trainer.train()
    assert sorted(seen) == sorted(tokens()(data["prompt"][:])["input_ids"])  # 2 rollouts, each prompt once


@pytest.mark.parametrize("shuffled", [True, False])
def test_shuffling_can_be_switched_off(tmp_path, shuffled):
    data = tiny.tiny_prompts(8)
    trainer = ppo_run(tmp_path, {"train_dataset": data}, max_steps=1, shuffle_dataset=shuffled)
    in_order = tokens()(data["prompt"][:4])["input_ids"]
    assert (prompts_of(trainer._rollout) == in_order) is not shuffled


def test_stream_of_prompts_trains(tmp_path):
    trainer = ppo_run(tmp_path, {"train_dataset": tiny.tiny_prompts(16).to_iterable_dataset()}, total_episodes=12)
    assert trainer.state.global_step == 6
    assert len(logged(trainer, "reward/score")) == 3


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
        rollout = ppo_run(tmp_path, {"model": actor()}, **options, **stop)._rollout
        responses = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids, rollout.attended, strict=True)]
        last = {response[-1] for response, ended in zip(responses, rollout.has_eos, strict=True) if ended}
        # What ends no response is followed by more than padding.
        inside = {
            token for response in responses for place, token in enumerate(response) if any(response[place + 1 :])
        }
        return last, inside & {2, 9, 11}

    assert ends() == ({2, 9}, {11})
    assert ends(stop_token="eos") == ({2}, {9, 11})
    assert ends(stop_token_id=11) == ({11}, {2, 9})


def test_columns_that_nobody_reads_do_no_harm(tmp_path):
    data = tokenised_prompts(8).map(lambda row: {"lengths": len(row["input_ids"])})
    assert ppo_run(tmp_path, {"train_dataset": data}, max_steps=1).state.global_step == 1
