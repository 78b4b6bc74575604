"""`SampleCallback`: the completions are the models' own, beside those of the start, every n steps."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

import dpo_runs
import ppo_runs
import tiny
import trl_runs
from trl_ext import SampleCallback


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
PROMPTS = ["the cat", "what is a good book", [{"role": "user", "content": "why not"}]]


def table(folder, step):
    return [json.loads(line) for line in (folder / "samples" / f"step_{step:05d}.jsonl").read_text().splitlines()]


@torch.no_grad()
def slow_completion(model, prompt, length):
    """The most probable token, one at a time, without cache, padding or `generate`."""
    tokenizer = tiny.tiny_tokenizer()
    if not isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    new = []
    for _ in range(length):
        new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(new, skip_special_tokens=True)


def trainers(folder):
    peft = {"peft_config": LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), "ref_model": None}
    yield "PPOTrainerX", ppo_runs.ppo_trainer(folder / "ppo", learning_rate=0.1)
    yield "DPOTrainerX", dpo_runs.dpo_trainer(folder / "dpo", max_steps=4, learning_rate=1.0)
    yield "adapter", dpo_runs.dpo_trainer(folder / "peft", peft, max_steps=4, learning_rate=5.0)
    yield "trl.DPOTrainer", trl_runs.dpo_trainer(folder / "trl-dpo", max_steps=4, learning_rate=1.0)
    yield "trl.GRPOTrainer", trl_runs.grpo_trainer(folder / "grpo", learning_rate=0.1)
    yield "trl.SFTTrainer", trl_runs.sft_trainer(folder / "sft", max_steps=4, learning_rate=0.1)


def test_completions_are_those_of_the_model_and_of_its_start_in_any_trainer(tmp_path):
    for name, trainer in trainers(tmp_path):
        start = [slow_completion(trainer.model.eval(), prompt, 6) for prompt in PROMPTS]
        trainer.add_callback(SampleCallback(PROMPTS, every=2, max_new_tokens=6))
        trainer.train()
        end = [slow_completion(trainer.model.eval(), prompt, 6) for prompt in PROMPTS]
        tables = [table(Path(trainer.args.output_dir), step) for step in (0, 2, 4)]
        assert [row["prompt"] for row in tables[0]] == ["the cat", "what is a good book", "why not"], name
        assert [[row["reference"] for row in rows] for rows in tables] == [start] * 3, name
        assert [row["actor"] for row in tables[0]] == start, name
        assert [row["actor"] for row in tables[-1]] == end, name
        assert start != end, f"{name} has learnt nothing that shows"


def test_options_that_came_with_the_model_change_no_completion(tmp_path, monkeypatch):
    """Nor does transformers warn: it deprecates options beside a `generation_config`."""
    said = []
    trainer = trl_runs.sft_trainer(tmp_path, max_steps=1)
    own, model = trainer.model.generation_config, trainer.model.eval()
    own.update(repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=3, min_new_tokens=6, suppress_tokens=[9, 30])
    start = [slow_completion(model, prompt, 6) for prompt in PROMPTS]
    ids = tiny.tiny_tokenizer()(PROMPTS[0], return_tensors="pt").input_ids
    assert tiny.tiny_tokenizer().decode(model.generate(ids, max_new_tokens=6)[0, ids.size(1) :]) != start[0]
    trainer.add_callback(SampleCallback(PROMPTS, max_new_tokens=6))
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", said.append)
    trainer.train()
    assert said == []
    assert [row["actor"] for row in table(tmp_path, 0)] == start
    assert trainer.model.generation_config is own


def test_sampling_leaves_training_as_it_is(tmp_path):
    """No random number is drawn, and every module is in the mode that it was in."""
    plain = ppo_runs.ppo_run(tmp_path / "plain")
    trainer = ppo_runs.ppo_trainer(tmp_path / "sampled")
    trainer.add_callback(SampleCallback(PROMPTS, every=1, max_new_tokens=4))
    trainer.train()
    assert ppo_runs.logged(trainer, "loss") == ppo_runs.logged(plain, "loss")


def test_another_reference_can_be_given(tmp_path, capsys):
    reference = tiny.tiny_actor(7)
    trainer = trl_runs.sft_trainer(tmp_path)
    trainer.add_callback(SampleCallback(PROMPTS[:2], every=5, max_new_tokens=4, reference=reference))
    trainer.train()
    expected = [slow_completion(reference, prompt, 4) for prompt in PROMPTS[:2]]
    assert [row["reference"] for row in table(tmp_path, 2)] == expected  # at the end, though `every` is 5
    assert "Step 2: fixed prompts" in capsys.readouterr().out


def test_resumed_run_keeps_the_reference_of_its_start(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.1}
    first = trl_runs.sft_trainer(tmp_path, **saving)
    first.add_callback(SampleCallback(PROMPTS, every=1, max_new_tokens=4))
    first.train()
    second = trl_runs.sft_trainer(tmp_path, **(saving | {"max_steps": 3}))
    second.add_callback(SampleCallback(PROMPTS, every=1, max_new_tokens=4))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [row["reference"] for row in table(tmp_path, 3)] == [row["reference"] for row in table(tmp_path, 0)]


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": "the cat"}, "a list"),
        ({"prompts": ["a"], "every": 0}, "`every` is 0"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "`max_new_tokens` is 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        SampleCallback(**wrong)
