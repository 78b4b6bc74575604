"""`benchmarks/bench_learning.py`: its tasks, the rule of its learning rates, its table, tiny runs."""

import contextlib
import dataclasses
import io
import json
import math
import random

import matplotlib.font_manager  # noqa: F401  # it looks for fonts with processes, for which `Here` cannot stand in
import pytest
import torch

from commands import script
from run_logs import png_size


@pytest.fixture(scope="module")
def bench():
    return script("bench_learning")


@pytest.fixture(scope="module")
def setup(bench):
    import bench_learning_setup  # the one that the benchmark and its worker read

    return bench_learning_setup


# --- tasks


def slow_sorting(prompt, answer):
    """Places that are right, by selecting the smallest digit again and again."""
    left, right, places = prompt[:-1], 0, max(len(answer), len(prompt))
    for place in range(places):
        wanted = "<eos>" if not left and place == len(prompt) - 1 else None
        if left:
            wanted = left[0]
            for digit in left:
                if int(digit) < int(wanted):
                    wanted = digit
            left = list(left)
            left.remove(wanted)
        right += place < len(answer) and answer[place] == wanted
    return right / places


def slow_sum(prompt, answer):
    result = 0
    for word in prompt[:-1]:
        for _ in range(int(word)):
            result = 0 if result == 4 else result + 1
    return 1.0 if len(answer) >= 2 and answer[-1] == "<eos>" and answer[-2] == str(result) else 0.0


def slow_late(prompt, answer):
    largest = next(word for word in prompt[:-1] if all(int(word) >= int(other) for other in prompt[:-1]))
    return 1.0 if answer[0] == largest and "<eos>" in answer else 0.0


def slow_tool(prompt, answer):
    """The digits of the two keys by asking the tool."""
    from bench_learning_setup import tool_result

    said = [tool_result(prompt, ["get", key])[1] for key in prompt[:2]]
    largest = said[0] if int(said[0]) > int(said[1]) else said[1]
    return 1.0 if len(answer) >= 2 and answer[-1] == "<eos>" and answer[-2] == largest else 0.0


ORACLES = {"sorting": slow_sorting, "arithmetic": slow_sum, "late score": slow_late, "tool": slow_tool}


def unlike(score, oracle, task):
    """Whether a score differs from the oracle's on right, noisy, cut, lengthened and random answers."""
    from bench_learning_setup import VOCABULARY

    drawn = random.Random(0)
    for _ in range(200):
        prompt = task.prompt(drawn)
        noisy = task.answer(prompt, drawn, 0.5)
        chance = [*drawn.choices(VOCABULARY[2:], k=drawn.randint(1, task.limit)), "<eos>"]
        for answer in (task.answer(prompt, drawn, 0.0), noisy, noisy[:-1], ["3", *noisy], noisy[:1], chance):
            if score(prompt, answer) != pytest.approx(oracle(prompt, answer)):
                return True
    return False


@pytest.mark.parametrize("name", ORACLES)
def test_scores_are_those_of_a_slow_oracle_and_a_right_answer_scores_one(bench, name):
    task, drawn = bench.TASKS[name], random.Random(1)
    assert not unlike(task.score, ORACLES[name], task)
    prompts = [task.prompt(drawn) for _ in range(300)]
    right = [task.answer(prompt, drawn, 0.0) for prompt in prompts]
    assert {task.score(prompt, answer) for prompt, answer in zip(prompts, right, strict=True)} == {1.0}
    assert max(map(len, right)) <= task.limit
    noisy = [task.score(prompt, task.answer(prompt, drawn, task.noise)) for prompt in prompts]
    assert 0.05 < sum(noisy) / 300 < 0.8


def test_control_a_score_that_forgives_what_follows_is_noticed(bench):
    """Sorting without the end, and a sum that may stand anywhere."""

    def places(prompt, answer):
        return sum(a == b for a, b in zip(answer, sorted(prompt[:-1]), strict=False)) / 6

    def anywhere(prompt, answer):
        return float(str(sum(map(int, prompt[:-1])) % 5) in answer)

    assert unlike(places, slow_sorting, bench.TASKS["sorting"])
    assert unlike(anywhere, slow_sum, bench.TASKS["arithmetic"])


def test_prompts_are_the_same_for_a_seed_and_not_those_held_out(bench, setup):
    task = bench.TASKS["late score"]
    prompts, held_out = setup.training_prompts(task, 500, seed=3), setup.held_out_prompts(task)
    assert prompts == setup.training_prompts(task, 500, seed=3)
    assert prompts != setup.training_prompts(task, 500, seed=4)
    assert not {*map(tuple, prompts)} & {*map(tuple, held_out)}
    assert len(held_out) == 128


def test_answers_are_sampled_from_the_model_with_the_words_of_the_tool_between(bench, setup):
    """Log-probabilities are those of a row read alone and whole; the tool speaks behind each digit of the policy."""
    task = dataclasses.replace(
        bench.TASKS["tool"], observe=lambda prompt, answer: ["["] * answer[-1].isdigit(), limit=9
    )
    model = setup.LlamaForCausalLM(setup.LlamaConfig(**setup.MODEL)).eval()
    prompts = [["3", "="], ["a", "b", "1", "2", "="], ["="]]
    torch.manual_seed(0)
    played = setup.play(model, task, prompts)
    assert played["prompt_ids"] == [setup.ids_of(prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        answer, mask, said = (played[name][i] for name in ("completion_ids", "env_mask", "logprobs"))
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([setup.ids_of(prompt) + answer])).logits[0, len(prompt) - 1 : -1]
        assert said == pytest.approx(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0], abs=1e-5)
        words = setup.words_of(answer)
        expected = [1]
        for before, word, own in zip(words[:-1], words[1:], mask[:-1], strict=True):
            expected.append(0 if before.isdigit() and own else 1)
            assert expected[-1] == 1 or word == "["
        assert mask == expected
        assert len(answer) == 9 or words[-1] == "<eos>"
    assert any(0 in mask for mask in played["env_mask"])


def test_rule_in_the_form_of_a_reward_model_scores_rows_with_padding(bench, setup):
    task = bench.TASKS["sorting"]
    rows = ["<pad> <pad> 2 1 = 1 2 <eos>", "3 1 2 = 1 3 <eos> <pad>"]
    states = (
        script("bench_learning_worker").RuleReward(task).rule(torch.tensor([setup.ids_of(r.split()) for r in rows]))
    )
    assert states.hidden_states[-1][..., 0].tolist() == [[1.0] * 8, [0.25] * 8]


# --- the rule of the rates, and which runs there are


def run(of_job, *scores, seconds=1.0):
    samples = [1000 * i for i in range(len(scores))]
    return {"job": of_job, "curve": list(zip(samples, scores, strict=True)), "seconds": seconds}


@pytest.fixture
def starts(bench, tmp_path):
    return {task: tmp_path / task for task in bench.TASKS}


def test_rate_is_that_of_the_best_mean_area_once_all_have_run(bench, starts, tmp_path):
    runs = bench.Runs(tmp_path / "runs.jsonl")
    jobs = bench.tuning_jobs("sorting", "plain", starts)
    assert [(job["learning_rate"], job["seed"]) for job in jobs] == [(r, s) for r in bench.RATES for s in (101, 102)]
    ends = {bench.RATES[0]: (0.2, 0.6), bench.RATES[1]: (0.5, 0.5), bench.RATES[2]: (0.9, None)}
    for job in jobs:
        assert bench.chosen_rate("sorting", "plain", starts, runs) is None
        assert bench.reported_jobs("sorting", "plain", starts, runs) == []
        end = ends[job["learning_rate"]][job["seed"] - 101]
        runs.add({"job": job, "error": "NaN"} if end is None else run(job, 0.0, end))
    assert bench.chosen_rate("sorting", "plain", starts, runs) == bench.RATES[1]  # 0.25 against 0.2 and 0.45 / 2
    reported = bench.reported_jobs("sorting", "plain", starts, runs)
    assert [job["seed"] for job in reported] == list(bench.SEEDS)
    assert {job["learning_rate"] for job in reported} == {bench.RATES[1]}
    assert not {*bench.SEEDS} & {*bench.TUNING_SEEDS}


def test_trl_1_12_has_no_tools_and_papers_tell_the_critic_its_rate(bench, starts):
    cells = bench.cells(bench.TASKS, bench.TRAINERS)
    assert len(cells) == len(bench.TASKS) * len(bench.TRAINERS) - 1
    assert ("tool", bench.BASELINE) not in cells
    assert bench.job("tool", "vapo", 1e-3, 1, starts)["options"]["critic_learning_rate"] == 2e-3
    assert "critic_learning_rate" not in bench.job("tool", "plain", 1e-3, 1, starts)["options"]


# --- the arithmetic of the report


def test_area_and_samples_are_those_of_straight_lines(bench):
    curve = {"job": {}, "curve": [[0, 0.2], [100, 0.4], [300, 1.0]], "seconds": 1}
    assert bench.area(curve) == pytest.approx((100 * 0.3 + 200 * 0.7) / 300)
    assert bench.samples_to(curve, 0.7) == pytest.approx(200)
    assert bench.samples_to(curve, 0.1) == 0
    assert bench.samples_to(curve, 1.1) is None


def test_interval_is_student_t_and_differences_are_paired_by_seed(bench):
    mean, half = bench.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == pytest.approx((3.0, 2.776 * math.sqrt(2.5) / math.sqrt(5)))
    ours = [run({"seed": seed}, height, height) for seed, height in ((1, 0.5), (2, 0.9), (3, 0.6))]
    bar = [run({"seed": seed}, height, height) for seed, height in ((3, 0.4), (1, 0.4), (2, 0.6))]
    mean, half = bench.difference(ours, bar)  # 0.1, 0.3 and 0.2
    assert (mean, half) == pytest.approx((0.2, 4.303 * 0.1 / math.sqrt(3)))


def test_table_has_a_row_for_each_trainer(bench):
    def runs(rate, *ends):
        return [run({"seed": i, "learning_rate": rate}, 0.2, end, seconds=2.0) for i, end in enumerate(ends, 1)]

    failed = [{"job": {"seed": 1, "learning_rate": 3e-4}, "error": "NaN"}, *runs(3e-4, 0, 0.4)[1:]]
    of_task = {"grpo-1": runs(3e-4, 0.4, 0.6), "plain": runs(1e-3, 1.0, 0.8), "sao": failed}
    lines = bench.table(of_task).splitlines()
    assert lines[2:] == [
        "| GRPO, 1 iteration | 0.0003 | 0.350 ± 0.635 |  | 0.500 | never | 2 |",
        "| `PPOTrainerX` | 0.001 (edge) | 0.550 ± 0.635 | +0.200 ± 1.271 | 0.900 | 788 (1 of 2) | 2 |",
        "| SAO | 0.0003 | 0.150 ± 1.906 | -0.200 ± 1.271 | 0.400 | never | 2 |",
    ]
    assert len({line.count("|") for line in lines}) == 1


# --- runs


class Here:
    """A worker in this process instead of one of its own."""

    def __init__(self, command, stdout, stderr, env, text):
        self.returncode, lines = 0, io.StringIO()
        with contextlib.redirect_stdout(lines):
            script("bench_learning_worker").main(command[2:])
        self.stdout = lines.getvalue().splitlines()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
def test_runs_are_tuned_reported_and_not_repeated(bench, tmp_path, monkeypatch, capsys):
    """A task and two trainers on a start that has hardly learned; a second call finds all runs there."""
    monkeypatch.setitem(bench.TASKS, "sorting", dataclasses.replace(bench.TASKS["sorting"], imitation=2))
    monkeypatch.setattr(bench, "SIZES", {"batch": 8, "samples": 8, "measurements": 1})
    monkeypatch.setattr(bench, "RATES", (1e-3,))
    monkeypatch.setattr(bench, "TUNING_SEEDS", (101,))
    monkeypatch.setattr(bench, "SEEDS", (1, 2))
    monkeypatch.setattr(bench.subprocess, "Popen", Here)
    output, picture = tmp_path / "runs.jsonl", tmp_path / "learning.png"
    words = ["--tasks", "sorting", "--trainers", "grpo-1", "plain", "--workers", "1"]
    words += ["--output", str(output), "--picture", str(picture), "--cache", str(tmp_path)]
    bench.main([*words, "--report"])
    assert not (tmp_path / "bench-learning").exists()
    bench.main([*words, "--minutes", "0"])
    assert not output.exists()
    bench.main([*words, "--tune"])
    assert len(output.read_text().splitlines()) == 2
    bench.main(words)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["job"]["trainer"], line["job"]["seed"]) for line in lines] == [
        *(("grpo-1", 101), ("plain", 101), ("grpo-1", 1), ("grpo-1", 2), ("plain", 1), ("plain", 2))
    ]
    assert [[samples for samples, _ in line["curve"]] for line in lines] == [[0, 8]] * 6
    assert len({tuple(line["curve"][0]) for line in lines}) == 1  # the same start
    assert "; 0 runs left" in capsys.readouterr().out
    monkeypatch.setattr(bench.subprocess, "Popen", None)  # no process is needed
    bench.main(words)
    bench.main([*words, "--report"])
    assert len(output.read_text().splitlines()) == 6
    assert "| `PPOTrainerX` | 0.001" in capsys.readouterr().out
    assert png_size(picture)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer", ["grpo-4", "recommended"])
def test_trainers_learn_from_answers_with_a_tool(bench, tmp_path, monkeypatch, trainer):
    monkeypatch.setitem(bench.TASKS, "tool", dataclasses.replace(bench.TASKS["tool"], imitation=2))
    monkeypatch.setattr(bench, "SIZES", {"batch": 16, "samples": 16, "measurements": 1})
    start = bench.start_of("tool", tmp_path)
    bench.make_start("tool", start)
    job = bench.job("tool", trainer, 1e-3, 1, {"tool": start})
    worker = script("bench_learning_worker")
    assert [samples for samples, _ in worker.run(job, start.parent)["curve"]] == [0, 16]
