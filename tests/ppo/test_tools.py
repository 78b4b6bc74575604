"""Tokens that the actor did not write: of a rollout function, a tool, an environment."""

import pytest
import torch

import tiny
from ppo_runs import log_lines, logged, ppo_run, ppo_trainer, sum_of_terms
from tool_runs import Room, look, tool_models
from trl_ext import PPOTrainerX
from trl_ext.ppo.rollout import Rollout


def play(prompts, trainer):
    """A rollout function whose responses hold a token of the environment in the middle."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {
        "prompt_ids": ids,
        "completion_ids": [[10, 11, 12 + row, 13, 2] for row in range(len(ids))],
        "logprobs": [[-1.0] * 5 for _ in ids],
        "env_mask": [[1, 0, 0, 1, 1]] * len(ids),
        "bonus": [float(row) for row in range(len(ids))],
    }


def test_without_vllm_the_mask_reads_the_policys_own_log_probabilities(tmp_path, monkeypatch):
    """Not those of the rollout function, -1 at every token here."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    models = {"reward_model": None, "reward_funcs": lambda bonus, **_: bonus, "rollout_func": play}
    trainer = ppo_run(tmp_path, models, max_steps=1, policy_objective="mask", num_mini_batches=1)
    assert trainer.run_state.rollout.sampling_logps is None
    assert log_lines(trainer)[0]["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)


def test_tokens_of_the_environment_are_attended_and_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    models = {"reward_model": None, "reward_funcs": lambda bonus, **_: bonus, "rollout_func": play}
    trainer = ppo_run(tmp_path, models, max_steps=2, gamma=0.9, whiten_advantages=False, kl_placement="reward")
    rollout = trainer.run_state.rollout
    hole = torch.tensor([True, False, False, True, True])
    assert rollout.mask.equal(hole.expand(4, 5))
    assert rollout.attended.all()
    assert rollout.scores.tolist() == [0.0, 1.0, 2.0, 3.0]
    # GAE steps over the hole: the response without it has the same advantages.
    values = rollout.old_values[:, hole]
    advantages = torch.zeros(4, 3)
    for t in (2, 1, 0):
        following = values[:, t + 1] if t < 2 else 0
        reward = rollout.scores if t == 2 else 0
        delta = reward + 0.9 * following - values[:, t]
        advantages[:, t] = delta + (0.9 * 0.95 * advantages[:, t + 1] if t < 2 else 0)
    torch.testing.assert_close(rollout.advantages[:, hole], advantages, rtol=1e-5, atol=1e-6)
    assert not rollout.advantages[:, ~hole].any()
    assert logged(trainer, "completions/mean_length") == [3.0]
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)


def test_rollout_takes_over_grpos_masks():
    batch = {
        "prompt_ids": torch.tensor([[0, 7], [8, 9], [8, 9]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
        "completion_ids": torch.tensor([[10, 11, 2, 0], [10, 2, 12, 13], [10, 11, 12, 13]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]),
    }
    rollout = Rollout.from_grpo(batch, torch.tensor([1.0, 2.0, torch.nan]), end_ids=[2])
    assert rollout.mask.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert rollout.attended.int().tolist() == batch["completion_mask"].tolist()
    assert rollout.scored.tolist() == [True, True, False]
    assert rollout.scores.tolist() == [1.0, 2.0, 0.0]
    assert rollout.has_eos.tolist() == [True, False, False]  # in the second, an earlier turn ended
    inputs = rollout.model_inputs()
    assert inputs["labels"].tolist()[0] == [-100, -100, 10, -100, 2, -100]
    assert inputs["attention_mask"].tolist()[0] == [0, 1, 1, 1, 1, 0]
    assert inputs["position_ids"].tolist()[0] == [0, 0, 1, 2, 3, 3]


def calls_a_tool_once(monkeypatch):
    """Every response is a call of the tool, then three tokens. TRL's own loop runs between the two."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"word": "cat"}}}

    def parse(tokenizer, ids, prefix=None, tools=None):
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        return message | ({"tool_calls": [call]} if ids[0] == 10 else {})

    def turn(self, prompt_ids, *args, **kwargs):
        after_tool = any(tiny.VOCABULARY.index("film") in ids for ids in prompt_ids)
        return [[20, 21, 2] if after_tool else [10, 11, 2] for _ in prompt_ids], None

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", parse)
    monkeypatch.setattr(PPOTrainerX, "_generate_single_turn", turn)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.parametrize("source", ["tools", "environment"])
def test_answers_of_a_tool_are_attended_and_do_not_count(tmp_path, monkeypatch, source):
    calls_a_tool_once(monkeypatch)
    given = {"tools": [look]} if source == "tools" else {"environment_factory": Room, "reward_model": None}
    trainer = ppo_run(tmp_path, tool_models() | given, max_steps=2, response_length=40)
    rollout = trainer.run_state.rollout
    film = tiny.VOCABULARY.index("film")
    for row in range(4):
        written = rollout.response_ids[row][rollout.mask[row]].tolist()
        read = rollout.response_ids[row][rollout.attended[row]].tolist()
        assert written == [10, 11, 2, 20, 21, 2]
        assert film in read
        assert film not in written
    assert logged(trainer, "tools/call_frequency") == [1.0]
    assert logged(trainer, "tools/failure_frequency") == [0.0]
    if source == "environment":
        assert logged(trainer, "rewards/Room/mean") == logged(trainer, "reward/score") == [0.5]
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)


def test_environment_may_bring_its_own_prompts(tmp_path, monkeypatch):
    calls_a_tool_once(monkeypatch)
    monkeypatch.setattr(Room, "reset", lambda self, **kwargs: "bird")
    models = tool_models() | {"environment_factory": Room, "reward_model": None, "train_dataset": None}
    trainer = ppo_run(tmp_path, models, total_episodes=4, response_length=40)
    assert trainer.state.global_step == 2
    prompts = tiny.tiny_tokenizer().batch_decode(trainer.run_state.rollout.prompt_ids)
    assert all("bird" in prompt for prompt in prompts)


class PayingRoom(Room):
    """Pays for each turn, beside its reward of 0.5."""

    turns = (1.0, 0.25)

    def get_turn_rewards(self):
        return list(self.turns)


class Game:
    """Pays for turns alone, by the messages: 2 for a call of a tool, -1 for an answer."""

    look = Room.look

    def reset(self, **kwargs):
        return None

    async def get_turn_rewards(self, completion):
        said = [message for message in completion if message["role"] == "assistant"]
        return torch.tensor([2.0 if "tool_calls" in message else -1.0 for message in said])


def test_environment_pays_for_turns_at_their_last_token(tmp_path, monkeypatch):
    calls_a_tool_once(monkeypatch)
    models = tool_models() | {"environment_factory": PayingRoom, "reward_model": None}
    models |= {"reward_funcs": lambda completions, **_: [10.0] * len(completions)}
    trainer = ppo_run(tmp_path, models, max_steps=1, response_length=40, reward_weights=[0.1])
    rollout = trainer.run_state.rollout
    for row in range(4):
        assert rollout.paid[row][rollout.mask[row]].tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 0.25 + 0.5 + 1.0]
    assert not rollout.paid[~rollout.mask].any()
    assert logged(trainer, "rewards/PayingRoom/mean") == [0.5]
    assert logged(trainer, "rewards/PayingRoom_turns/mean") == [1.25]
    assert logged(trainer, "reward/score") == [2.75]
    assert [tool.__name__ for tool in trainer.tools] == ["look"]
    assert all([*tools] == ["look"] for tools in trainer._sync_tool_dicts)


def test_only_environments_that_pay_for_turns_are_asked(tmp_path, monkeypatch):
    calls_a_tool_once(monkeypatch)
    models = tool_models() | {"environment_factory": {"room": Room, "game": lambda: Game()}, "reward_model": None}
    models["train_dataset"] = models["train_dataset"].add_column("environment", ["room", "game"] * 2)
    trainer = ppo_run(tmp_path, models, max_steps=1, response_length=40)
    rollout = trainer.run_state.rollout
    paid = sorted(rollout.paid[row][rollout.mask[row]].tolist() for row in range(4))
    assert paid == [[0.0, 0.0, 0.0, 0.0, 0.0, 0.5]] * 2 + [[0.0, 0.0, 2.0, 0.0, 0.0, -1.0]] * 2
    assert [tool.__name__ for tool in trainer._env_tools["game"]] == ["look"]
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)


def test_messages_tell_an_environment_of_a_result_that_did_not_fit(tmp_path, monkeypatch):
    """The tool was called, and its answer is not in the response: one turn, not two."""
    calls_a_tool_once(monkeypatch)
    models = tool_models() | {"environment_factory": Game, "reward_model": None}
    trainer = ppo_run(tmp_path, models, max_steps=1, response_length=4)
    assert trainer.run_state.rollout.paid.tolist() == [[0.0, 0.0, 2.0]] * 4


@pytest.mark.parametrize(
    "turns, error, what",
    [
        ([1.0], ValueError, r"environment 'PayingRoom' returned \[1.0\] for a response of 2 turns: prompt .*look"),
        ([1.0, 0.0, 2.0], ValueError, "for a response of 2 turns"),
        ([1.0, float("nan")], FloatingPointError, r"'PayingRoom_turns' is nan at token \d+ at step 0 for prompt"),
        ([1.0, "good"], ValueError, "'PayingRoom_turns' returned 'good', a str, for a token"),
    ],
    ids=str,
)
def test_turn_rewards_that_do_not_fit_name_the_environment_and_the_sample(tmp_path, monkeypatch, turns, error, what):
    calls_a_tool_once(monkeypatch)
    monkeypatch.setattr(PayingRoom, "turns", turns)
    models = tool_models() | {"environment_factory": PayingRoom, "reward_model": None}
    trainer = ppo_trainer(tmp_path, models, max_steps=1, response_length=40)
    with pytest.raises(error, match=what):
        trainer.train()


def test_clipped_scores_and_turn_rewards_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    with pytest.raises(ValueError, match="reward 'PayingRoom_turns' pays at single tokens or turns"):
        ppo_trainer(tmp_path, tool_models() | {"reward_model": None, "environment_factory": PayingRoom}, reward_clip=1)
