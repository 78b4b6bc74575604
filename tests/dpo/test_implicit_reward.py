"""`ImplicitReward` is β (log π_θ(y|x) − log π_ref(y|x)): against the slow oracle, and against DPO's own rewards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import dpo_runs
import ppo_runs
import tiny
from trl_ext import ImplicitReward


BETA = 0.3


def slow_reward(policy, reference, prompt, completion, tokenizer, beta=BETA):
    """One sequence at a time, from the ids as DPO's training cuts them."""
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        ids = tokenizer(prompt + completion + ("" if completion.endswith("<eos>") else "<eos>"))["input_ids"]
    else:
        prompt_ids = tokenizer(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False))[
            "input_ids"
        ]
        ids = tokenizer(tokenizer.apply_chat_template(prompt + completion, tokenize=False))["input_ids"]
    assert ids[: len(prompt_ids)] == prompt_ids
    answer = ids[len(prompt_ids) :]
    return beta * (
        dpo_runs.slow_logps(policy, prompt_ids, answer) - dpo_runs.slow_logps(reference, prompt_ids, answer)
    )


def texts():
    data = dpo_runs.tiny_pairs(6)
    return data["prompt"], data["chosen"]


def conversations():
    prompts = [[{"role": "user", "content": text.strip()}] for text in texts()[0]]
    prompts[1] = [{"role": "system", "content": "the cat"}, *prompts[1]]
    return prompts, [[{"role": "assistant", "content": text.removesuffix("<eos>")}] for text in texts()[1]]


@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("rows", [texts, conversations])
def test_reward_equals_the_slow_oracle(rows, batch_size):
    policy, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    tokenizer = tiny.tiny_tokenizer()
    prompts, completions = rows()
    got = ImplicitReward(policy, reference, tokenizer, BETA, batch_size)(prompts, completions)
    expected = [slow_reward(policy, reference, p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_reward_needs_no_pad_token():
    policy, reference = dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1)
    expected = ImplicitReward(policy, reference, tiny.tiny_tokenizer(), BETA)(*texts())
    without = tiny.tiny_tokenizer()
    without.pad_token = None
    assert ImplicitReward(policy, reference, without, BETA)(*texts()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adapter", ["off", "ref"])
def test_reward_of_an_adapter_takes_its_start_as_the_reference(adapter):
    """Without its adapter, or with the adapter "ref" that `DPOTrainerX` left."""
    policy = dpo_runs.with_adapter(dpo_runs.tiny_model())
    reference = dpo_runs.tiny_model()
    if adapter == "ref":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            policy.add_adapter("ref", LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
        reference = dpo_runs.tiny_model()
        reference = get_peft_model(reference, LoraConfig(r=2, task_type="CAUSAL_LM"))
        own = dict(policy.named_parameters())
        for name, parameter in reference.named_parameters():
            if ".default." in name:
                parameter.data.copy_(own[name.replace(".default.", ".ref.")])
    tokenizer = tiny.tiny_tokenizer()
    prompts, completions = texts()
    score = ImplicitReward(policy, None, tokenizer, BETA)
    expected = [slow_reward(policy, reference, p, c, tokenizer) for p, c in zip(prompts, completions, strict=True)]
    assert score(prompts, completions) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert policy.active_adapter == "default"


def test_reward_of_the_reference_is_0():
    prompts, completions = texts()
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(), tiny.tiny_tokenizer(), BETA)
    assert score(prompts, completions) == [0.0] * 6


def test_ranking_is_by_reward_the_best_first():
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tiny.tiny_tokenizer())
    answers = ["good", "bad dog", "the cat is happy", "why ?"]
    rewards = score(["the film "] * 4, answers)
    ranking = score.rank("the film ", answers)
    assert sorted(ranking) == [0, 1, 2, 3]
    assert [rewards[i] for i in ranking] == sorted(rewards, reverse=True)


@pytest.mark.integration
@pytest.mark.parametrize("conversational", [False, True])
def test_rewards_are_those_of_the_training(tmp_path, conversational):
    """The means over a batch that `DPOTrainerX` logs for chosen and rejected completions."""
    data = dpo_runs.tiny_pairs()
    if conversational:

        def turn(role, text):
            return [{"role": role, "content": text.strip().removesuffix("<eos>")}]

        data = data.map(
            lambda row: {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
        )
    options = {"per_device_train_batch_size": 8, "learning_rate": 0.0, "max_steps": 1, "beta": BETA}
    line = dpo_runs.lines(dpo_runs.dpo_run(tmp_path, {"train_dataset": data}, **options))[0]
    score = ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), tiny.tiny_tokenizer(), BETA)
    chosen, rejected = (score(data["prompt"], data[side]) for side in ("chosen", "rejected"))
    assert sum(chosen) / 8 == pytest.approx(line["rewards/chosen"], rel=1e-4, abs=1e-6)
    assert sum(rejected) / 8 == pytest.approx(line["rewards/rejected"], rel=1e-4, abs=1e-6)
    right = [good > bad for good, bad in zip(chosen, rejected, strict=True)]
    assert sum(right) / 8 == line["preference/accuracy"]


@pytest.mark.integration
@pytest.mark.parametrize("conversational", [False, True])
def test_reward_function_of_ppo(tmp_path, conversational):
    score = ImplicitReward(dpo_runs.tiny_model(seed=2), dpo_runs.tiny_model(seed=1), tiny.tiny_tokenizer())
    given = []

    def spy(prompts, completions, **kwargs):
        rewards = score(prompts, completions, **kwargs)
        given.extend(rewards)
        return rewards

    models = {
        "reward_model": None,
        "reward_funcs": score,
        "train_dataset": tiny.tiny_prompts(16, conversational=conversational),
    }
    trainer = ppo_runs.ppo_run(tmp_path, models, total_episodes=4)
    line = ppo_runs.log_lines(trainer)[0]
    assert any("implicit_reward" in key for key in line), sorted(line)
    spied = ppo_runs.ppo_run(tmp_path, models | {"reward_funcs": spy}, total_episodes=4)
    assert len(given) >= 4
    key = next(key for key in line if key.startswith("reward") and "implicit_reward" in key and "mean" in key)
    assert ppo_runs.log_lines(spied)[0][key.replace("implicit_reward", "spy")] == pytest.approx(line[key], rel=1e-5)
    assert line[key] == pytest.approx(sum(given[:4]) / 4, rel=1e-4)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_beta_must_be_above_0(beta):
    with pytest.raises(ValueError, match=r"`beta` is .*; give the β > 0"):
        ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(), tiny.tiny_tokenizer(), beta)


def test_no_reference_is_refused_without_an_adapter():
    with pytest.raises(ValueError, match="no adapter to switch off: give the model DPO started from"):
        ImplicitReward(dpo_runs.tiny_model(), None, tiny.tiny_tokenizer())


def test_reference_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary of 64 tokens and `reference` one of 70"):
        ImplicitReward(dpo_runs.tiny_model(), dpo_runs.tiny_model(vocab_size=70), tiny.tiny_tokenizer())
