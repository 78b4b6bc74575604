"""Rewards at tokens: weighted, paid where they stand or at the nearest token that counts, through a whole run."""

import math

import pytest
import torch

import layouts
import oracles
from ppo_runs import log_lines, ppo_run, ppo_trainer, response_lengths, snapshot
from trl_ext.ppo import rollout as rollout_module
from trl_ext.ppo import trainer as trainer_module


@pytest.fixture(autouse=True)
def _no_warning_of_rollout_func(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def by_token(completion_ids, **_):
    return [[token % 7 / 4 - 0.5 for token in ids] for ids in completion_ids]


async def in_all_forms(completion_ids, **_):
    """A score with rewards by token; of two tokens a score alone, of one token nothing."""
    rewards = [{"score": len(ids) / 8, "tokens": torch.tensor(ids) / 64} for ids in completion_ids]
    return [{1: None, 2: 0.25}.get(len(ids), each) for ids, each in zip(completion_ids, rewards, strict=True)]


def in_all_forms_by_hand(ids):
    """Pairs of a token and a reward."""
    last = len(ids) - 1
    if last < 2:
        return [(last, 0.25)] * last
    return [*((token, id_ / 64) for token, id_ in enumerate(ids)), (last, len(ids) / 8)]


def length(completion_ids, **_):
    return [len(ids) / 10 for ids in completion_ids]


SOURCES = {
    by_token: lambda ids: list(enumerate(by_token([ids])[0])),
    in_all_forms: in_all_forms_by_hand,
    length: lambda ids: [(len(ids) - 1, len(ids) / 10)],
}
WEIGHTS = [1.5, -0.5, 2.0]


def paid_by_hand(ids, counts):
    """Reward by reward: at its token, else the last one before it that counts, else the first that does."""
    paid = [0.0] * len(ids)
    for source, weight in zip(SOURCES.values(), WEIGHTS, strict=True):
        for token, reward in source(ids):
            places = [t for t in range(token, -1, -1) if counts[t]] or [t for t in range(len(ids)) if counts[t]]
            paid[places[0]] += weight * reward
    return paid


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    models = {"train_dataset": layouts.PROMPTS, "eval_dataset": layouts.PROMPTS, "rollout_func": layouts.answer}
    models |= {"reward_model": None, "reward_funcs": list(SOURCES)}
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "response_length": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        folder = tmp_path_factory.mktemp("tokens")
        return ppo_trainer(folder, models, reward_weights=WEIGHTS, per_device_eval_batch_size=8, **options)


def collected(trainer):
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in layouts.PROMPTS["prompt"]])


def difference_by_hand(rollout):
    """The largest difference of any token's reward, and of any score from the sum of its tokens."""
    worst = 0.0
    for row, counts in enumerate(layouts.ENV_MASKS):
        size = len(counts)
        expected = paid_by_hand(rollout.response_ids[row, :size].tolist(), counts)
        found = rollout.paid[row].tolist()
        expected += [0.0] * (len(found) - size)
        differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
        worst = max(worst, *differences, abs(rollout.scores[row].item() - sum(expected)))
    return worst


def test_sources_are_paid_where_they_stand(trainer):
    rollout = collected(trainer)
    assert rollout.mask.tolist() == [[bool(k) for k in row] + [False] * (9 - len(row)) for row in layouts.ENV_MASKS]
    assert difference_by_hand(rollout) < 1e-5
    assert not rollout.paid[~rollout.mask].any()
    part = rollout.select(torch.tensor([4, 2]))
    assert torch.equal(part.paid, rollout.paid[[4, 2]])


def one_token_early(monkeypatch):
    place = trainer_module.weighted_tokens
    monkeypatch.setattr(trainer_module, "weighted_tokens", lambda *args: place(*args).roll(-1, dims=1))


def left_at_masked_tokens(monkeypatch):
    monkeypatch.setattr(rollout_module, "paid_where_it_counts", lambda rewards, mask: rewards)


def dropped_at_masked_tokens(monkeypatch):
    monkeypatch.setattr(rollout_module, "paid_where_it_counts", lambda rewards, mask: rewards * mask)


def without_weights(monkeypatch):
    place = trainer_module.weighted_tokens
    monkeypatch.setattr(trainer_module, "weighted_tokens", lambda *args: place(*args[:-1], torch.ones_like(args[-1])))


@pytest.mark.parametrize(
    "mistake", [one_token_early, left_at_masked_tokens, dropped_at_masked_tokens, without_weights]
)
def test_control_a_mistake_in_paying_shows(trainer, monkeypatch, mistake):
    mistake(monkeypatch)
    assert difference_by_hand(collected(trainer)) > 0.1


def test_held_out_score_and_tables_have_the_sums(trainer):
    metrics = trainer.evaluate()
    ids = [
        collected(trainer).response_ids[row, : len(counts)].tolist() for row, counts in enumerate(layouts.ENV_MASKS)
    ]
    sums = [sum(paid_by_hand(each, counts)) for each, counts in zip(ids, layouts.ENV_MASKS, strict=True)]
    assert metrics["eval_reward/score"] == pytest.approx(sum(sums) / 8, abs=1e-5)
    of_source = [sum(each) for each in by_token(ids)]
    assert metrics["eval_rewards/by_token/mean"] == pytest.approx(sum(of_source) / 8, abs=1e-5)
    assert list(trainer._logs["rewards"]["by_token"])[-8:] == pytest.approx(of_source, abs=1e-5)


# --- a whole run


def at_the_last_token(function):
    def judge(completion_ids, **kwargs):
        scores = function(completion_ids=completion_ids, **kwargs)
        return [[0.0] * (len(ids) - 1) + [score] for ids, score in zip(completion_ids, scores, strict=True)]

    judge.__name__ = function.__name__
    return judge


def beside_zeros(function):
    def judge(completion_ids, **kwargs):
        scores = function(completion_ids=completion_ids, **kwargs)
        return [{"score": s, "tokens": [0.0] * len(ids)} for ids, s in zip(completion_ids, scores, strict=True)]

    judge.__name__ = function.__name__
    return judge


def first_id(completion_ids, **_):
    return [ids[0] / 64 for ids in completion_ids]


# Responses that the actor samples, with a reward model beside the function; and given ones, with holes.
RUNS = {
    "sampled": (
        [response_lengths],
        {},
        {
            "num_generations": 2,
            "missing_eos_penalty": 0.5,
            "critic_gate": True,
            "normalize_rewards": True,
            "whiten_rewards": True,
            "kl_placement": "reward",
            "kl_coef": 0.3,
        },
    ),
    "with holes": (
        [response_lengths, first_id, length],
        {"train_dataset": layouts.PROMPTS, "rollout_func": layouts.answer, "reward_model": None},
        {"reward_weights": [0.7, -1.3, 0.1], "response_length": 9, "lam": 0.9, "gamma": 0.9},
    ),
}


def trained(folder, kind, form):
    functions, models, options = RUNS[kind]
    trainer = ppo_run(folder, models | {"reward_funcs": [form(each) for each in functions]}, **options)
    lines = [{key: line[key] for key in line if key.startswith(layouts.LOGGED)} for line in log_lines(trainer)]
    return lines, snapshot(trainer.model), trainer.run_state.rollout


@pytest.mark.integration
@pytest.mark.parametrize("kind", RUNS)
def test_score_at_the_last_token_is_the_score_bit_for_bit(tmp_path, kind):
    lines, weights, rollout = trained(tmp_path, kind, lambda function: function)
    assert rollout.paid is None
    assert all(math.isfinite(value) for line in lines for value in line.values())
    for form in (at_the_last_token, beside_zeros):
        mine, own, rollout = trained(tmp_path, kind, form)
        assert rollout.paid is not None
        assert mine == lines
        assert all(torch.equal(parameter, weights[name]) for name, parameter in own.items())


@pytest.mark.integration
def test_rewards_at_tokens_reach_advantages_and_log(tmp_path):
    """GAE over the tokens that count, and the log's sums, from rewards by hand."""
    models = {"train_dataset": layouts.PROMPTS, "rollout_func": layouts.answer}
    models |= {"reward_model": None, "reward_funcs": list(SOURCES)}
    options = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "response_length": 9,
        "max_steps": 1,
    }
    options |= {"gamma": 0.9, "lam": 0.8, "whiten_advantages": False, "reward_weights": WEIGHTS}
    trainer = ppo_run(tmp_path, models, **options)
    rollout, totals = trainer.run_state.rollout, []
    prompts = [trainer.processing_class(prompt)["input_ids"] for prompt in layouts.PROMPTS["prompt"]]
    for row in range(8):
        counts = layouts.ENV_MASKS[prompts.index(rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist())]
        ids = rollout.response_ids[row, : len(counts)].tolist()
        rewards = [reward for reward, kept in zip(paid_by_hand(ids, counts), counts, strict=True) if kept]
        values = rollout.old_values[row][rollout.mask[row]].tolist()
        advantages = rollout.advantages[row][rollout.mask[row]].tolist()
        assert advantages == pytest.approx(oracles.gae(rewards, values, 0.9, 0.8), abs=1e-5)
        totals.append(sum(rewards))
    (line,) = log_lines(trainer)
    assert line["reward/score"] == line["reward/total"] == pytest.approx(sum(totals) / 8, abs=1e-5)


def test_clipped_scores_and_rewards_at_tokens_are_refused(tmp_path):
    """At the first rollout, since nothing is known of a function before it answers."""
    trainer = ppo_trainer(tmp_path, {"reward_funcs": [length, by_token]}, reward_clip=1.0)
    with pytest.raises(
        ValueError, match=r"`reward_clip=1.0` clips one score .* reward 'by_token' pays at single tokens"
    ):
        trainer.train()
