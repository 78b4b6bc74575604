"""Evaluation: held-out prompts answered, scored, compared with the first time; samples shown on the way."""

import math
import statistics
from copy import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import tiny
from ppo_runs import best_after_two_steps, changed, logged, ppo_run, ppo_trainer, returned_by, snapshot
from trl_ext.ppo.evaluation import HeldOut
from trl_ext.ppo.metrics import held_out_score, means_of_batches, scores_by_prompt


def test_evaluation_answers_every_held_out_prompt_and_scores_it(tmp_path):
    seen = []

    def grade(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [float(len(prompt)) for prompt in prompts]

    data = tiny.tiny_prompts(5, seed=3)
    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": data, "ref_model": tiny.tiny_actor(5)}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    before = snapshot(trainer.model)
    metrics = trainer.evaluate()
    assert sorted(seen) == sorted(data["prompt"][:])
    scores = torch.tensor([float(len(prompt)) for prompt in data["prompt"]])
    assert metrics["eval_reward/score"] == pytest.approx(scores.mean().item())
    assert metrics["eval_reward/score_ci95"] == pytest.approx(1.96 * scores.std().item() / 5**0.5, rel=1e-5)
    assert metrics["eval_kl/ref"] > 0.1
    assert metrics["eval_completions/mean_length"] > 1
    assert "eval_loss" not in metrics
    assert changed(trainer.model, before) == set()


def keep_evaluation(trainer, dataset):
    return trainer.evaluate(dataset)


def keep_prediction(trainer, dataset):
    trainer.predict(dataset)
    return {f"eval_{key}": values[0] for key, values in trainer.run_state.held_out.metrics("eval").items()}


@pytest.mark.parametrize(
    "how, given, options, prompts",
    [
        (keep_evaluation, Dataset.to_iterable_dataset, {}, 5),
        (keep_evaluation, list, {}, 5),
        (keep_evaluation, copy, {"per_device_eval_batch_size": 8, "dataloader_drop_last": True}, 2),
        (keep_prediction, copy, {}, 5),
        (keep_prediction, Dataset.to_iterable_dataset, {}, 5),
    ],
    ids=["stream", "list", "drop_last", "predict", "predict a stream"],
)
def test_several_responses_to_a_held_out_prompt(tmp_path, how, given, options, prompts):
    """The mean and its interval are over prompts; batches may cut a group."""
    graded = {}

    def grade(prompts, completions, **kwargs):
        scores = [len(completion) + 0.1 * len(prompt) for prompt, completion in zip(prompts, completions, strict=True)]
        for prompt, score in zip(prompts, scores, strict=True):
            graded.setdefault(prompt, []).append(score)
        return scores

    data = given(tiny.tiny_prompts(5, seed=3))
    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": data}
    options = {"per_device_eval_batch_size": 4, "num_generations_eval": 3} | options
    metrics = how(ppo_trainer(tmp_path, models, **options), data)
    whole = [scores for scores in graded.values() if len(scores) == 3]
    assert len(whole) == prompts
    means = torch.tensor([statistics.mean(scores) for scores in whole])
    assert metrics["eval_reward/score"] == pytest.approx(means.mean().item())
    assert metrics["eval_reward/score_ci95"] == pytest.approx(1.96 * means.std().item() / prompts**0.5, rel=1e-5)
    assert metrics["eval_reward/best_of_n"] == pytest.approx(statistics.mean(map(max, whole)))


FEW = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}


def nothing(prompts):
    return prompts.to_iterable_dataset().filter(lambda row: False)


@pytest.mark.parametrize(
    "given, n, message",
    [
        (copy, 1, "has 3 rows, and with `per_device_eval_batch_size=4` on 1 .* a batch needs 4.*_drop_last=False"),
        (nothing, 1, "has 0 rows"),
        (copy, 2, None),
    ],
    ids=["three", "none", "three answered twice"],
)
def test_held_out_prompts_that_make_no_batch_are_refused(tmp_path, given, n, message):
    prompts = given(tiny.tiny_prompts(3))
    by_hand = ppo_trainer(tmp_path, num_generations_eval=n, **FEW)
    if message is None:
        ppo_trainer(tmp_path, {"eval_dataset": prompts}, num_generations_eval=n, **FEW)
        assert "eval_reward/score" in by_hand.evaluate(prompts)
        return
    with pytest.raises(ValueError, match=f"the held-out set {message}"):
        by_hand.evaluate(prompts)
    with pytest.raises(ValueError, match="`eval_dataset` has "):
        ppo_trainer(tmp_path, {"eval_dataset": prompts}, **FEW)


def test_scores_by_prompt():
    nan = math.nan
    scores = torch.tensor([1.0, 3.0, 2.0, 5.0, nan, 4.0, nan, nan, 7.0, nan, nan, nan])
    found = scores_by_prompt(scores, 3)
    assert found["best_of_n"].tolist()[:3] == [3.0, 5.0, 7.0]
    assert found["best_of_n"][3].isnan()
    assert found["std_within_prompt"][:2].tolist() == pytest.approx([1.0, statistics.stdev([5, 4])])
    assert found["std_within_prompt"][2:].isnan().all()


def test_evaluation_leaves_training_alone(tmp_path):
    models = {"eval_dataset": tiny.tiny_prompts(2, seed=3)}
    trainer = ppo_run(tmp_path, models, eval_strategy="steps", eval_steps=1, num_sample_generations=0)
    plain = ppo_run(tmp_path)
    assert len(logged(plain, "reward/score")) == 2
    for key in ("reward/score", "loss", "kl/ref"):
        assert logged(trainer, key) == logged(plain, key)


def test_evaluations_of_one_policy_give_the_same_responses(tmp_path):
    """So an evaluation differs from the one before it by what was learnt, and by nothing else."""
    seen = []

    def grade(completions, **kwargs):
        seen.append(completions)
        return [float(len(completion)) for completion in completions]

    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": tiny.tiny_prompts(6, seed=3)}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=3)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]
    assert "eval_reward/rise" not in first
    assert (second["eval_reward/rise"], second["eval_reward/rise_ci95"]) == (0, 0)


def test_held_out_kl_is_the_mean_over_prompts_with_a_last_batch_of_another_size(tmp_path):
    """A mean of batch means would weigh the last prompt like the two of each batch before."""
    data = tiny.tiny_prompts(5, seed=3)
    trainer = ppo_trainer(
        tmp_path, {"ref_model": tiny.tiny_actor(5), "eval_dataset": data}, per_device_eval_batch_size=2
    )
    kept = returned_by(trainer, "_collect_held_out")
    metrics = trainer.evaluate()
    sums = [
        sum((r.old_logps[i, t] - r.ref_logps[i, t]).item() for t in range(r.mask.size(1)) if r.mask[i, t])
        for r in kept
        for i in range(len(r.mask))
    ]
    assert len(sums) == 5
    assert metrics["eval_kl/ref"] == pytest.approx(sum(sums) / 5, rel=1e-5)


def test_statistics_of_responses_do_not_depend_on_the_batches(tmp_path):
    """Seven prompts in batches of 2, 2, 2 and 1; the slow loop has every response by itself."""
    prompts = Dataset.from_dict({"prompt": ["the cat"] * 4 + ["a dog", "one bird", "two books of one"]})
    seen = []

    def graded(prompts, completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(len(prompt)) for prompt in prompts]

    def silent(prompts, **kwargs):
        return [None if prompt == "the cat" else float(len(prompt)) for prompt in prompts]

    def mute(prompts, **kwargs):
        return [2.0 if prompt == "a dog" else None for prompt in prompts]

    models = {"reward_model": None, "reward_funcs": [graded, silent, mute], "eval_dataset": prompts}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2, response_length=40)
    metrics = trainer.evaluate()
    lengths = [float(len(ids)) for ids in seen]
    ended = [length for length, ids in zip(lengths, seen, strict=True) if ids[-1] == 2]
    assert len(lengths) == 7
    assert len(set(ended)) > 1
    assert len(ended) < 7
    grades = [float(len(prompt)) for prompt in prompts["prompt"]]
    expected = {
        "rewards/graded/mean": statistics.mean(grades),
        "rewards/graded/std": statistics.stdev(grades),
        "rewards/silent/mean": statistics.mean(grades[4:]),
        "rewards/silent/std": statistics.stdev(grades[4:]),
        "rewards/mute/mean": 2.0,
        "reward/score": (sum(grades) + sum(grades[4:]) + 2) / 7,
        "completions/mean_length": statistics.mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / 7,
        "completions/mean_terminated_length": statistics.mean(ended),
        "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended),
    }
    found = {key: value for key, value in metrics.items() if key.removeprefix("eval_") in expected}
    assert found == pytest.approx({f"eval_{key}": value for key, value in expected.items()}, rel=1e-5)
    assert "eval_rewards/mute/std" not in metrics


def test_one_batch_of_held_out_prompts_gives_what_grpo_gives(tmp_path, monkeypatch):
    held_out = {"eval_dataset": tiny.tiny_prompts(6, seed=3)}
    trainer = ppo_trainer(tmp_path, held_out, per_device_eval_batch_size=6, response_length=4)
    ours = trainer.evaluate()
    monkeypatch.setattr("trl_ext.ppo.evaluation.held_out_responses", lambda columns: {})
    grpos = trainer.evaluate()
    keys = [key for key in grpos if key.startswith(("eval_completions/", "eval_rewards/"))]
    assert len(keys) >= 6
    assert {key: ours[key] for key in keys} == pytest.approx({key: grpos[key] for key in keys}, rel=1e-5)


def test_metrics_of_a_reward_function_are_averaged_over_responses_not_batches(tmp_path):
    """Seven prompts in batches of 3, 3 and 1: a mean of means would count the last like three."""
    prompts = Dataset.from_dict({"prompt": ["the cat"] * 3 + ["a dog"] * 3 + ["two books of one"]})
    counted = []

    def graded(prompts, log_metric, **kwargs):
        lengths = [float(len(prompt)) for prompt in prompts]
        log_metric("length", statistics.mean(lengths))
        if len(counted) != 3:  # not in the second batch
            counted.extend(lengths)
            log_metric("seldom", statistics.mean(lengths))
        else:
            counted.append(None)
        return lengths

    models = {"reward_model": None, "reward_funcs": graded, "eval_dataset": prompts}
    metrics = ppo_trainer(tmp_path, models, per_device_eval_batch_size=3).evaluate()
    lengths = [len(prompt) for prompt in prompts["prompt"]]
    assert metrics["eval_length"] == pytest.approx(statistics.mean(lengths))
    assert metrics["eval_seldom"] == pytest.approx(statistics.mean(counted[:3] + counted[4:]))


def test_rates_of_tools_are_over_responses_and_over_calls():
    batches = [
        {"tools/call_frequency": 1.0, "tools/failure_frequency": 0.5},  # 4 calls of 4 responses, 2 fail
        {"tools/call_frequency": 0.0, "tools/failure_frequency": math.nan},
        {"tools/call_frequency": 3.0, "tools/failure_frequency": 1 / 3},  # 3 calls of 1 response, 1 fails
    ]
    line = means_of_batches(batches, [4, 4, 1])
    assert line == pytest.approx({"tools/call_frequency": 7 / 9, "tools/failure_frequency": 3 / 7})
    assert means_of_batches(batches[1:2], [4]) == {"tools/call_frequency": 0.0}


def test_rise_is_measured_on_the_same_prompts_only(tmp_path):
    first, other = tiny.tiny_prompts(3, seed=3), tiny.tiny_prompts(3, seed=4)
    trainer = ppo_trainer(tmp_path, {"eval_dataset": first})
    trainer.evaluate()
    assert "eval_reward/rise" not in trainer.evaluate(other)
    assert trainer.evaluate()["eval_reward/rise"] == 0
    assert trainer.evaluate(other)["eval_reward/rise"] == 0


def test_rise_is_paired_by_prompt_and_skips_what_no_reward_scores():
    nan = math.nan
    first, scores = torch.tensor([0.0, 1.0, 2.0, 3.0, nan]), torch.tensor([1.0, 1.0, 5.0, nan, 9.0])
    line = held_out_score(scores, first)
    differences = torch.tensor([1.0, 0.0, 3.0])
    assert line["score"] == pytest.approx(4.0)
    assert line["score_ci95"] == pytest.approx(1.96 * torch.tensor([1.0, 1.0, 5.0, 9.0]).std().item() / 2)
    assert line["rise"] == pytest.approx(4 / 3)
    assert line["rise_ci95"] == pytest.approx(1.96 * differences.std().item() / math.sqrt(3))
    assert "rise" not in held_out_score(scores, first[:4])
    assert held_out_score(torch.full((2,), nan)) == {}


def test_one_held_out_prompt_has_no_interval(tmp_path):
    """Neither in the log nor on the card, and all logged numbers are finite."""
    models = {"eval_dataset": tiny.tiny_prompts(1, seed=3)}
    options = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 2, "num_sample_generations": 0}
    trainer = ppo_run(tmp_path, models, max_steps=2, **options)
    trainer.create_model_card()
    assert len(logged(trainer, "eval_reward/score")) == 2
    assert len(logged(trainer, "eval_reward/rise")) == 1
    assert [key for line in trainer.state.log_history for key in line if "ci95" in key] == []
    values = [value for line in trainer.state.log_history for value in line.values() if value is not None]
    assert all(math.isfinite(value) for value in values)
    card = (tmp_path / "README.md").read_text()
    assert "| rise of the score since the first evaluation |" in card
    assert "±" not in card.split("## Results")[1].split("## ")[0]
    assert "| held-out data | 1 row |" in card


def test_held_out_prompts_without_an_answer_have_no_kl():
    """An empty response has no KL to the reference."""
    held_out = HeldOut()
    held_out.start(lambda values: values)
    rollout = SimpleNamespace(
        scores=torch.zeros(2),
        scored=torch.ones(2, dtype=torch.bool),
        mask=torch.zeros(2, 3, dtype=torch.bool),
        old_logps=torch.zeros(2, 3),
        ref_logps=torch.zeros(2, 3),
    )
    nothing = {"length": torch.zeros(2), "ended": torch.zeros(2)}
    held_out.add(rollout, [{"prompt": "a"}, {"prompt": "b"}], nothing, {})
    metrics = held_out.metrics("eval")
    assert metrics["reward/score"] == [0.0]
    assert all(math.isfinite(value) for (value,) in metrics.values())


def test_sample_completions_are_printed_with_their_scores(tmp_path, capsys):
    def bracketed(completions, **kwargs):
        return [1.25] * len(completions)

    prompts = Dataset.from_dict({"prompt": ["cat", "dog", "bird"]})
    models = {"reward_model": None, "reward_funcs": bracketed, "eval_dataset": prompts}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    logs = dict(trainer._metrics["eval"])
    trainer.generate_completions()
    output = capsys.readouterr().out
    assert output.count("Samples at step 0") == 2
    assert output.count("1.250") == 3
    assert all(word in output for word in ("cat", "dog", "bird"))
    trainer.generate_completions(sampling=True)
    assert capsys.readouterr().out.count("1.250") == 2
    assert trainer._metrics["eval"] == logs
    assert trainer.model.training


# --- the best checkpoint

EVERY_TWO = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
EVERY_TWO |= {"per_device_eval_batch_size": 2, "num_sample_generations": 0}


@pytest.mark.parametrize("how", [{"load_best_model_at_end": True}, {"save_strategy": "best"}], ids=str)
def test_best_checkpoint_is_that_of_the_highest_held_out_score(tmp_path, how):
    """No metric is named; the Trainer would default to an evaluation loss, which PPO does not have."""
    models = {"reward_model": None, "reward_funcs": best_after_two_steps, "eval_dataset": tiny.tiny_prompts(3)}
    trainer = ppo_run(tmp_path, models, **(EVERY_TWO | how))
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.0, 2)
    assert max(logged(trainer, "eval_reward/score")) == 0.0
    assert trainer.args.greater_is_better


def test_best_checkpoint_of_several_held_out_sets_needs_the_name_of_one(tmp_path):
    models = {"reward_model": None, "reward_funcs": best_after_two_steps}
    models["eval_dataset"] = {"a": tiny.tiny_prompts(3), "b": tiny.tiny_prompts(3)}
    best = EVERY_TWO | {"load_best_model_at_end": True}
    for metric in (None, "eval_reward/score"):
        with pytest.raises(ValueError, match=r"2 held-out sets bear their names.*'eval_a_reward/score' or 'eval_b_"):
            ppo_trainer(tmp_path, models, **best, metric_for_best_model=metric)
    trainer = ppo_run(tmp_path, models, **best, metric_for_best_model="eval_b_reward/score")
    assert trainer.state.best_global_step == 2


def test_unknown_metric_for_the_best_model_is_an_error_that_lists_the_known(tmp_path):
    trainer = ppo_trainer(tmp_path, {"eval_dataset": tiny.tiny_prompts(3)}, **EVERY_TWO, metric_for_best_model="zzz")
    with pytest.raises(
        ValueError, match=r"`metric_for_best_model` is 'zzz', and an .* eval_reward/score, .* Set it to"
    ):
        trainer.train()
    assert trainer.state.global_step == 2


def test_several_sets_may_be_evaluated_by_hand(tmp_path):
    sets = {"a": tiny.tiny_prompts(3, seed=3), "b": tiny.tiny_prompts(4, seed=4)}
    trainer = ppo_trainer(tmp_path, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(sets)
    for name, prompts in sets.items():
        alone = trainer.evaluate(prompts)
        for key in ("reward/score", "reward/score_ci95", "kl/ref", "completions/clipped_ratio"):
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(alone[f"eval_{key}"])
