"""`benchmarks/measure_value_heads.py`: what it samples, its heads, a tiny run."""

import dataclasses

import pytest
import torch

from commands import script


@pytest.fixture(scope="module")
def heads():
    return script("measure_value_heads")


def test_values_are_asked_for_before_every_token_that_counts(heads):
    import bench_learning_setup as setup

    task = heads.TASKS["tool"]
    model = setup.LlamaForCausalLM(setup.LlamaConfig(**setup.MODEL)).eval()
    ids, mask, scores = heads.sampled(model, task, 5)
    torch.manual_seed(0)
    prompts = setup.training_prompts(task, 5, seed=0)
    played = setup.play(model, task, prompts)
    for row, (prompt, answer, own) in enumerate(
        zip(played["prompt_ids"], played["completion_ids"], played["env_mask"], strict=True)
    ):
        assert ids[row, : len(prompt) + len(answer)].tolist() == prompt + answer
        judged = [len(prompt) + place - 1 for place, counts in enumerate(own) if counts]
        assert mask[row].nonzero().flatten().tolist() == judged
        assert set(scores[row].tolist()) == {task.score(prompts[row], setup.words_of(answer))}


def test_least_squares_find_what_is_linear_in_the_states_of_the_rows_they_learn_from(heads):
    """And a head with a hidden layer finds what is not."""
    torch.manual_seed(0)
    states, weight = torch.randn(80, 4, 6), torch.randn(6)
    mask = torch.rand(80, 4) < 0.7
    scores = states @ weight + 2.0
    predict = heads.by_least_squares(states, mask[:64], scores[:64])
    torch.testing.assert_close(predict(torch.arange(64, 80)), scores[64:], rtol=1e-2, atol=1e-2)
    bent = states[..., 0].square()
    linear = heads.by_least_squares(states, mask[:64], bent[:64])(torch.arange(64, 80))
    assert heads.explained_variance(linear, bent[64:], mask[64:]) < 0.5
    head = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    best = heads.best_of_passes(head.parameters(), lambda rows: head(states[rows]).squeeze(-1), mask, bent, 64, 300)
    assert best > 0.8


@pytest.mark.integration
def test_table_has_a_row_for_each_task(heads, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(heads.TASKS, "sorting", dataclasses.replace(heads.TASKS["sorting"], imitation=2))
    words = ["--tasks", "sorting", "--answers", "20", "--passes", "1", "--cache", str(tmp_path)]
    heads.main(words)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| *sorting* | ")
    assert all(float(each) < 1 for each in row.split("|")[2:5])
