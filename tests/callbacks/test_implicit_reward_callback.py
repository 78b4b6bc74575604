"""`ImplicitRewardCallback`: the rewards of single pairs, against DPO's own metrics and one sequence at a time."""

import json

import pytest
from peft import LoraConfig

import dpo_runs
import ppo_runs
import tiny
import trl_runs
from trl_ext import ImplicitRewardCallback


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
PAIRS = dpo_runs.tiny_pairs(8)


def table(folder, step):
    lines = (folder / "implicit_rewards" / f"step_{step:05d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def slow_rewards(model, reference, beta, side):
    """One sequence at a time, from the ids of prompt and completion."""
    tokenizer = tiny.tiny_tokenizer()
    rewards = []
    for row in PAIRS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        text = row["prompt"] + row[side]
        ids = tokenizer(text if text.endswith("<eos>") else text + "<eos>")["input_ids"]
        answer = ids[len(prompt) :]
        ratio = dpo_runs.slow_logps(model, prompt, answer) - dpo_runs.slow_logps(reference, prompt, answer)
        rewards.append(beta * ratio)
    return rewards


@pytest.mark.parametrize("side", [dpo_runs.OURS, dpo_runs.TRLS], ids=["DPOTrainerX", "trl.DPOTrainer"])
@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_rewards_agree_with_the_trainers_own_evaluation(tmp_path, side, kind):
    models = {"model": tiny.save_tiny(tmp_path)["actor"], "ref_model": None, "eval_dataset": PAIRS}
    if kind == "adapter":
        models["peft_config"] = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "learning_rate": 1.0}
    trainer = dpo_runs.dpo_trainer(tmp_path, models, side, **options)
    trainer.add_callback(ImplicitRewardCallback(PAIRS))
    trainer.train()
    start, end = table(tmp_path, 0), table(tmp_path, 4)
    assert [row["margin"] for row in start] == [0.0] * 8
    evaluation = [line for line in trainer.state.log_history if "eval_rewards/chosen" in line][-1]
    assert mean(end, "chosen_reward") == pytest.approx(evaluation["eval_rewards/chosen"], abs=1e-5)
    assert mean(end, "rejected_reward") == pytest.approx(evaluation["eval_rewards/rejected"], abs=1e-5)
    assert mean(end, "margin") == pytest.approx(evaluation["eval_rewards/margins"], abs=1e-5)
    assert abs(mean(end, "margin")) > 1e-3


@pytest.mark.parametrize("name", ["PPOTrainerX", "trl.GRPOTrainer"])
def test_rewards_of_a_policy_that_samples_equal_the_slow_oracle(tmp_path, name):
    if name == "PPOTrainerX":
        trainer = ppo_runs.ppo_trainer(tmp_path, learning_rate=0.05)
    else:
        trainer = trl_runs.grpo_trainer(tmp_path, learning_rate=0.05)
    trainer.add_callback(ImplicitRewardCallback(PAIRS, beta=0.3, every=2))
    trainer.train()
    for side in ("chosen", "rejected"):
        expected = slow_rewards(trainer.model.eval(), tiny.tiny_actor(), 0.3, side)
        assert [row[f"{side}_reward"] for row in table(tmp_path, 4)] == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert max(map(abs, expected)) > 1e-2
    assert (tmp_path / "implicit_rewards" / "step_00002.jsonl").is_file()


def test_given_reference_is_the_reference(tmp_path, capsys):
    trainer = dpo_runs.dpo_trainer(tmp_path)  # whose reference is the model of seed 1
    trainer.add_callback(ImplicitRewardCallback(PAIRS, reference=dpo_runs.tiny_model(seed=1)))
    trainer.train()
    assert "Step 2: implicit rewards" in capsys.readouterr().out
    expected = slow_rewards(dpo_runs.tiny_model(), dpo_runs.tiny_model(seed=1), 0.1, "chosen")
    assert [row["chosen_reward"] for row in table(tmp_path, 0)] == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_resumed_run_keeps_the_reference_of_its_start(tmp_path):
    models = {"model": tiny.save_tiny(tmp_path)["actor"], "ref_model": None}
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1.0}
    first = dpo_runs.dpo_trainer(tmp_path, models, **options)
    first.add_callback(ImplicitRewardCallback(PAIRS, every=1))
    first.train()
    second = dpo_runs.dpo_trainer(tmp_path, models, **(options | {"max_steps": 3}))
    second.add_callback(ImplicitRewardCallback(PAIRS, every=1))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = slow_rewards(second.model.eval(), tiny.tiny_actor(), 0.1, "chosen")
    assert [row["chosen_reward"] for row in table(tmp_path, 3)] == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"pairs": []}, "0 rows"),
        ({"pairs": [{"chosen": "a", "rejected": "b"}]}, r"without \['prompt'\]"),
        ({"pairs": PAIRS, "beta": 0.0}, "above 0"),
        ({"pairs": PAIRS, "every": 0}, "at least 1"),
    ],
)
def test_options_that_mean_nothing_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        ImplicitRewardCallback(**wrong)


def test_trainer_without_a_beta_is_told_to_give_one(tmp_path):
    trainer = trl_runs.sft_trainer(tmp_path)
    trainer.add_callback(ImplicitRewardCallback(PAIRS))
    with pytest.raises(ValueError, match="SFTConfig has no `beta`"):
        trainer.train()
