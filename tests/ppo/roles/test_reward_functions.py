"""What reward functions may take and return, the errors that name them, and their names in the log."""

import asyncio
import math

import numpy
import pytest
import torch

from ppo_runs import log_lines, ppo_run, ppo_trainer
from tool_runs import Room, tool_models
from trl_ext.ppo.roles.reward_functions import checked, named_apart


GIVEN = {"prompts": ["a", "b"], "completions": ["c", "d"], "completion_ids": [[1], [2]]}


def function_that_returns(answer, is_async):
    def judge(completions, **kwargs):
        return answer

    async def judge_later(completions, **kwargs):
        return answer

    judge_later.__name__ = "judge"
    return checked(judge_later if is_async else judge, "judge")


def ask(function, is_async, **given):
    result = function(**GIVEN, **given)
    return asyncio.run(result) if is_async else result


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "answer, expected",
    [
        ([1, 2.5], [1.0, 2.5]),
        ((1.0, None), [1.0, None]),
        ([True, False], [1.0, 0.0]),
        (torch.tensor([1.0, 2.0], requires_grad=True), [1.0, 2.0]),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16), [1.5, 2.0]),
        (numpy.array([1, 2]), [1.0, 2.0]),
        ([numpy.float32(0.5), torch.tensor(2)], [0.5, 2.0]),
        ([None, None], [None, None]),
    ],
    ids=str,
)
def test_answer_is_taken_as_numbers(answer, expected, is_async):
    scores = ask(function_that_returns(answer, is_async), is_async)
    assert scores == expected
    assert all(score is None or type(score) is float for score in scores)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "reward, expected",
    [
        ([1, 2.5], [1.0, 2.5]),
        ((1.0, 2.0), [1.0, 2.0]),
        ([True, False], [1.0, 0.0]),
        (torch.tensor([1.5, 2.0], dtype=torch.bfloat16, requires_grad=True), [1.5, 2.0]),
        (numpy.array([1, 2]), [1.0, 2.0]),
        ([numpy.float32(0.5), torch.tensor(2)], [0.5, 2.0]),
        ({"score": 3, "tokens": [1.0, 2.0]}, [1.0, 5.0]),
        ({"tokens": numpy.array([1.0, 2.0]), "score": torch.tensor(0.5)}, [1.0, 2.5]),
    ],
    ids=str,
)
def test_rewards_of_tokens_are_kept_beside_their_sum(reward, expected, is_async):
    function = function_that_returns([None, 0.5, reward], is_async)
    given = {name: [*values, values[-1]] for name, values in GIVEN.items()} | {"completion_ids": [[1], [2], [3, 4]]}
    result = function(**given)
    assert (asyncio.run(result) if is_async else result) == [None, 0.5, sum(expected)]
    assert function.token_rewards == [None, None, expected]
    assert all(type(number) is float for number in function.token_rewards[2])


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "answer, what",
    [
        (None, "returned None. Return a list with one number for each completion"),
        (1.0, r"returned a float \(1.0\)"),
        (True, r"returned a bool \(True\)"),
        ("good", r"returned a str \('good'\)"),
        ({"a": 1.0, "b": 2.0}, "returned a dict"),
        (torch.tensor(1.0), r"returned a Tensor of shape \(\)"),
        (torch.zeros(2, 1), r"returned a Tensor of shape \(2, 1\)"),
        (numpy.zeros((1, 2)), r"returned a ndarray of shape \(1, 2\)"),
        (["1.0", 2.0], "returned '1.0', a str, for completion 0"),
        ([1.0, {2.0}], r"returned {2.0}, a set, for completion 1"),
        ([1.0, torch.zeros(1, 1)], r"returned tensor\(\[\[0.\]\]\), a Tensor, for completion 1"),
        ([1.0, ["2.0"]], "returned '2.0', a str, for a token of completion 1"),
        ([1.0, [None]], "returned None, a NoneType, for a token of completion 1"),
        (
            [[1.0], [2.0, 3.0]],
            "returned 2 token rewards for a response of 1 tokens: prompt 'b', response 'd'. Return one",
        ),
        ([[], 1.0], "returned 0 token rewards for a response of 1 tokens"),
        (
            [{"score": 1.0}, 1.0],
            r"returned a dictionary of \['score'\] for completion 0\. Return a list with one number",
        ),
        ([{"score": 1.0, "tokens": [1.0], "more": 1}, 1.0], "returned a dictionary of .*'more'"),
        ([{"score": 1.0, "tokens": 2.0}, 1.0], "returned 2.0, a float, for the tokens of completion 0"),
        ([{"score": None, "tokens": [1.0]}, 1.0], "returned None, a NoneType, for the score of completion 0"),
        ([1.0, numpy.str_("2")], r"returned .*a str_, for completion 1"),
        ([1.0], "returned 1 rewards, but 2 were expected"),
        ([1.0, 2.0, 3.0], "returned 3 rewards, but 2 were expected"),
    ],
    ids=str,
)
def test_answer_of_another_form_is_an_error_that_names_the_function(answer, what, is_async):
    with pytest.raises(ValueError, match=f"The reward function 'judge' {what}"):
        ask(function_that_returns(answer, is_async), is_async)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    "reward", [[math.nan], {"score": 0.0, "tokens": [-math.inf]}, {"score": 10**400, "tokens": [0]}]
)
def test_token_reward_that_is_not_finite_is_an_error_that_names_the_token(reward, is_async):
    with pytest.raises(FloatingPointError, match=r"reward 'judge' is .* at token 0 .* prompt 'b', response 'd'"):
        ask(function_that_returns([1.0, reward], is_async), is_async)


@pytest.mark.parametrize("is_async", [False, True])
def test_function_that_raises_is_named_with_the_option_that_asks_again(is_async):
    def fail(**kwargs):
        raise ConnectionError("refused")

    async def fail_later(**kwargs):
        fail()

    asked = checked(fail_later if is_async else fail, "judge")
    with pytest.raises(ConnectionError, match="refused") as failed:
        asyncio.run(asked(completions=["a"])) if is_async else asked(completions=["a"])
    assert failed.value.__notes__[0].startswith("The reward function 'judge' raised this at step ?. If what it asks")
    assert "`reward_max_retries` asks it again" in failed.value.__notes__[0]


def test_reward_function_must_accept_its_arguments():
    def narrow(completions):
        return [0.0] * len(completions)

    def other(samples, **kwargs):
        return [0.0] * len(samples)

    with pytest.raises(
        ValueError, match=r"'narrow' cannot be called .*narrow\(completions\).*'prompts'.*`\*\*kwargs`"
    ):
        checked(narrow, "narrow")
    late = checked(other, "other")  # a column of the data may be called so
    assert late(**GIVEN, samples=["a", "b"]) == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"'other' cannot be called: it needs 'samples'.*has none beside the prompt"):
        late(**GIVEN)
    checked(max, "max")  # a builtin that has no signature is asked and seen


def test_sync_function_that_gives_a_coroutine_is_an_error():
    async def inner():
        return [0.0, 0.0]

    with pytest.raises(ValueError, match="'later' returned a coroutine"):
        checked(lambda **kwargs: inner(), "later")(**GIVEN)


def test_functions_are_refused_before_training(tmp_path):
    def narrow(prompts, completions):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="The reward function 'narrow' cannot be called"):
        ppo_trainer(tmp_path, {"reward_model": None, "reward_funcs": narrow})


@pytest.mark.parametrize(
    "names, expected",
    [
        (["a", "b"], ["a", "b"]),
        (["a", "a", "a"], ["a", "a_2", "a_3"]),
        (["a", "a", "a_2"], ["a", "a_3", "a_2"]),
        (["a_2", "a", "a"], ["a_2", "a", "a_3"]),
    ],
)
def test_names_are_made_different(names, expected):
    assert named_apart(names) == expected


def test_functions_of_one_name_are_logged_and_weighted_apart(tmp_path):
    def make(value):
        def judge(completions, **kwargs):
            return [value] * len(completions)

        return judge

    trainer = ppo_run(
        tmp_path,
        {"reward_model": None, "reward_funcs": [make(1.0), make(10.0)]},
        reward_weights=[1.0, 0.5],
        max_steps=1,
    )
    line = log_lines(trainer)[0]
    assert line["rewards/judge/mean"] == 1.0
    assert line["rewards/judge_2/mean"] == 10.0
    assert line["reward/score"] == 6.0
    assert trainer.run_state.rollout.scores.tolist() == [6.0] * 4

    def broken(completions, **kwargs):
        return "no"

    broken.__name__ = "judge"
    trainer = ppo_trainer(tmp_path, {"reward_model": None, "reward_funcs": [make(1.0), broken]})
    with pytest.raises(ValueError, match="The reward function 'judge_2' returned a str"):
        trainer.train()


@pytest.mark.parametrize(
    "answer, what", [("good", "returned 'good', a str, for completion 0"), ([1.0, 2.0], "returned 2 token rewards")]
)
def test_environments_reward_is_checked_too(tmp_path, monkeypatch, answer, what):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setattr(Room, "get_reward", lambda self: answer)
    trainer = ppo_trainer(tmp_path, tool_models() | {"environment_factory": Room, "reward_model": None})
    with pytest.raises(ValueError, match=f"The reward function 'Room' .*{what}"):
        trainer.reward_funcs[0](**GIVEN, environments=[Room(), Room()])
