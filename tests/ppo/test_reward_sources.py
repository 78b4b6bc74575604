"""Where scores come from: models on ids or on text, functions sync and async, mixed, weighted, and `None`."""

import copy
import functools

import pytest
import torch

import tiny
from oracles import moments
from ppo_runs import log_lines, logged, ppo_run, ppo_trainer, response_lengths, sequences


def tokenizer_with(*tokens):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def shifted_tokenizer():
    """The same words, each with another id."""
    tokenizer = tiny.tiny_tokenizer()
    tokenizer._tokenizer.model = type(tokenizer._tokenizer.model)(
        {word: (i + 7) % len(tiny.VOCABULARY) for i, word in enumerate(tiny.VOCABULARY)}, unk_token="<unk>"
    )
    return tokenizer


def save_reward_model(folder, tokenizer=None, **overrides):
    tiny.tiny_reward_model(**overrides).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def record_inputs(model):
    """A list that fills with the token ids, without padding, of every sequence that the model reads."""
    seen = []

    def note(module, args, kwargs):
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            seen.append(ids[mask.bool()].tolist())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def as_read(rollout):
    """What a reward model with the actor's tokenizer reads: the sampled ids, with eos for a special one at last."""
    special = {*range(len(tiny.SPECIAL_TOKENS)), len(tiny.VOCABULARY)}  # [PAD] behind the vocabulary
    words = [
        (prompt, response[:-1] if response[-1] in special else response) for prompt, response in sequences(rollout)
    ]
    return [[*prompt, *response, tiny.VOCABULARY.index("<eos>")] for prompt, response in words]


# --- ids or text: found out, not assumed


def test_model_with_the_actors_tokenizer_reads_the_ids_as_sampled(tmp_path):
    path = save_reward_model(tmp_path / "rm", tiny.tiny_tokenizer())
    trainer = ppo_trainer(tmp_path, {"reward_model": path}, max_steps=1, response_length=30, packing=False)
    seen = record_inputs(trainer.reward_funcs[0].model)
    trainer.train()
    assert seen == as_read(trainer.run_state.rollout)
    assert trainer.run_state.rollout.has_eos.any()  # whose end token is read too


def test_given_tokenizer_decides_for_a_model_in_memory(tmp_path):
    model = tiny.tiny_reward_model(vocab_size=80)
    shared = ppo_trainer(tmp_path, {"reward_model": copy.deepcopy(model)})
    own = ppo_trainer(tmp_path, {"reward_model": model, "reward_processing_classes": [shifted_tokenizer()]})
    assert hasattr(shared.reward_funcs[0], "pad_token_id")  # the wrapper that hands over ids
    assert own.reward_funcs[0] is model


def test_model_in_memory_with_too_few_tokens_must_bring_its_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"knows 32 tokens and the actor 64.*`reward_processing_classes`"):
        ppo_trainer(tmp_path, {"reward_model": tiny.tiny_reward_model(vocab_size=32)})


@pytest.mark.parametrize("rows", [64, 72])  # without and with a row in the embedding for the new token
def test_pad_token_that_only_the_actors_tokenizer_has_changes_nothing(tmp_path, rows):
    """Scripts for TRL 1.12 add "[PAD]" to the actor's tokenizer."""
    path = save_reward_model(tmp_path / "rm", tiny.tiny_tokenizer(), vocab_size=rows)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 64
    models = {"reward_model": path, "processing_class": tokenizer, "model": tiny.tiny_actor(vocab_size=rows)}
    trainer = ppo_trainer(tmp_path, models, max_steps=1, packing=False)
    seen = record_inputs(trainer.reward_funcs[0].model)
    trainer.train()
    assert seen == as_read(trainer.run_state.rollout)
    assert tokenizer.pad_token == "[PAD]"  # the user's tokenizer is left alone


# --- functions


async def even_rows(completions, **kwargs):
    return [1.0 if row % 2 == 0 else None for row in range(len(completions))]


async def odd_rows(completions, **kwargs):
    return [None if row % 2 == 0 else 2.0 for row in range(len(completions))]


def count_of(completions, word, **kwargs):
    return [float(completion.split().count(word)) for completion in completions]


class Judge:
    """A callable without a `__name__`."""

    def __call__(self, completions, **kwargs):
        return [0.25] * len(completions)


def test_function_sees_prompts_completions_columns_and_state(tmp_path):
    seen = []

    def grade(prompts, completions, completion_ids, target, trainer_state, **kwargs):
        seen.append((prompts, completions, completion_ids, target, trainer_state.global_step))
        return [float(value) for value in target]

    data = tiny.tiny_prompts(8).map(lambda row: {"target": len(row["prompt"])})
    trainer = ppo_run(tmp_path, {"reward_model": None, "reward_funcs": grade, "train_dataset": data}, max_steps=1)
    ((prompts, completions, completion_ids, target, step),) = seen
    assert target == [len(prompt) for prompt in prompts]
    assert trainer.run_state.rollout.scores.tolist() == target
    tokens = tiny.tiny_tokenizer()
    assert completions == tokens.batch_decode(completion_ids, skip_special_tokens=True)
    assert step == 0


def test_sources_are_weighted_with_the_reward_model_first(tmp_path):
    functions = [response_lengths, even_rows]
    trainer = ppo_run(tmp_path, {"reward_funcs": functions}, reward_weights=[2.0, 10.0, -3.0], max_steps=1)
    rollout = trainer.run_state.rollout
    with torch.no_grad():
        of_model = [tiny.tiny_reward_model()(torch.tensor([ids])).logits.item() for ids in as_read(rollout)]
    lengths = response_lengths(tiny.tiny_tokenizer().batch_decode(rollout.response_ids, skip_special_tokens=True))
    expected = [
        2 * score + 10 * length - 3 * (row % 2 == 0)
        for row, (score, length) in enumerate(zip(of_model, lengths, strict=True))
    ]
    torch.testing.assert_close(rollout.scores, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert logged(trainer, "rewards/response_lengths/mean") == pytest.approx([sum(lengths) / 4])
    assert logged(trainer, "rewards/even_rows/mean") == [1.0]
    assert logged(trainer, "rewards/reward_model/mean") == pytest.approx([sum(of_model) / 4], rel=1e-5)


def test_sample_is_masked_only_when_all_sources_give_none(tmp_path):
    trainer = ppo_run(tmp_path, {"reward_model": None, "reward_funcs": [even_rows]}, max_steps=1)
    rollout = trainer.run_state.rollout
    assert rollout.scored.tolist() == [True, False, True, False]
    assert rollout.mask.any(dim=1).tolist() == [True, False, True, False]
    assert rollout.attended.any(dim=1).all()
    assert logged(trainer, "reward/score") == [1.0]
    # Means over tokens are over the tokens of the two that count.
    with torch.no_grad():
        values = rollout.old_values[rollout.mask].double()
        returns = rollout.returns[rollout.mask].double()
    assert log_lines(trainer)[0]["terms/value_loss"] == pytest.approx(
        (0.5 * (values - returns).square()).mean().item(), rel=1e-5
    )


def test_rollout_without_scores_is_not_learned_from(tmp_path):
    def silent(completions, **kwargs):
        return [None] * len(completions)

    options = {"kl_controller": "band", "kl_coef": 0.1, "target_kl": 0.1}
    trainer = ppo_run(tmp_path, {"reward_model": None, "reward_funcs": silent}, **options)
    assert trainer.run_state.coefficients.now.kl == 0.1  # no KL was measured, so nothing moves the controller
    assert logged(trainer, "policy/steps_left_out") == [1] * 4


@pytest.mark.parametrize(
    "function, name",
    [
        (response_lengths, "response_lengths"),
        (even_rows, "even_rows"),
        (functools.partial(count_of, word="cat"), "count_of"),
        (Judge(), "Judge"),
    ],
)
def test_function_is_logged_under_its_name(tmp_path, function, name):
    trainer = ppo_trainer(tmp_path, {"reward_model": None, "reward_funcs": function})
    assert trainer.reward_func_names == [name]


def test_model_is_logged_under_the_last_part_of_its_path(tmp_path):
    path = save_reward_model(tmp_path / "kind", tiny.tiny_tokenizer())
    text = save_reward_model(tmp_path / "strict", tokenizer_with("zebra"), vocab_size=80)
    nameless = tiny.tiny_reward_model(vocab_size=80)
    models = {"reward_model": path, "reward_funcs": [text, nameless]}
    models["reward_processing_classes"] = [None, None, tokenizer_with("zebra")]
    trainer = ppo_trainer(tmp_path, models)
    assert trainer.reward_func_names == ["kind", "strict", "reward_model"]


# --- shaping


def shaped_total(tmp_path, **options):
    """`reward/total` of a run whose scores are 1, 2, 1, 2 and whose responses have no end token."""
    models = {"reward_model": None, "reward_funcs": [even_rows, odd_rows], "model": tiny.tiny_actor(5)}
    trainer = ppo_run(tmp_path, models, max_steps=1, response_length=2, **options)
    assert not trainer.run_state.rollout.has_eos.any()
    assert logged(trainer, "reward/score") == [1.5]
    return logged(trainer, "reward/total")[0]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 1.5),
        ({"reward_clip": 1.25}, (1 + 1.25) / 2),
        ({"missing_eos_penalty": 3.0}, 1.5 - 3.0),
        ({"normalize_rewards": True}, 1.5 / moments([1.0, 2.0, 1.0, 2.0])[2] ** 0.5),
        ({"normalize_rewards": True, "reward_clip": 2.5, "missing_eos_penalty": 1.0}, (2.0 + 2.5) / 2 - 1.0),
    ],
)
def test_scores_are_normalised_then_clipped_then_lowered_for_a_missing_end(tmp_path, options, expected):
    assert shaped_total(tmp_path, **options) == pytest.approx(expected, rel=1e-5)


def test_normalisation_runs_over_all_rollouts(tmp_path):
    def grow(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * 2 + [1.0 + trainer_state.global_step] * 2

    models = {"reward_model": None, "reward_funcs": grow}
    trainer = ppo_run(tmp_path, models, num_ppo_epochs=1, normalize_rewards=True)
    seen = [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0]]
    assert logged(trainer, "reward/total") == pytest.approx(
        [0.5 / moments(seen[0])[2] ** 0.5, 1.5 / moments(seen[0] + seen[1])[2] ** 0.5], rel=1e-5
    )
