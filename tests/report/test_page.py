"""The page of a report: what stands on it, from logs alone; that it is self-contained and well-formed."""

import base64
import hashlib
import html.parser
import json
import os
import re
import time
from pathlib import Path

import pytest
from datasets import Dataset

from commands import command
from run_logs import DPO_LOG, PPO_LOG, png_size, run_folder, write_completions
from trl_ext.report import Run, read_run, write_report
from trl_ext.report.chart import Curve, running_mean
from trl_ext.report.credit import Credit
from trl_ext.report.drawing import COLOURS
from trl_ext.report.machine_panels import seconds
from trl_ext.report.page import render
from trl_ext.report.pictures import OF_KIND, OTHER, charts_of, panels_of
from trl_ext.report.policy_panels import POLICY
from trl_ext.report.preference_panels import PREFERENCE
from trl_ext.report.run import told_apart
from trl_ext.runs.folder import is_of_this_run
from trl_ext.runs.tables import write_rows


DONE = {"step": 2, "train_runtime": 1.0}


def text_of(page):
    """What a reader sees, without markup and curves."""
    body = re.sub(r"<(style|script|title).*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def headings(page):
    return re.findall(r"<figure[^>]*>\s*<h3>([^<]*) <button", page)


def curves_of(page):
    """The curves that the page carries, by panel."""
    text = re.search(r'<script type="application/json" id="curves">(.*?)</script>', page, flags=re.DOTALL)[1]
    data = json.loads(text)
    for panel in data["panels"]:
        for curve in (curve for chart in panel["charts"] for curve in chart["curves"]):
            curve |= {
                name: data["arrays"][curve[name]] for name in ("steps", "y", "x", "low", "high") if name in curve
            }
    return data


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their panels, for tests of what else stands on them: the PNG takes a second or two."""
    monkeypatch.setattr("trl_ext.report.page.charts_of", lambda runs: [])


class Balanced(html.parser.HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = {"meta", "br", "input", "progress", "!doctype"}

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


# --- what stands on it


def test_page_of_a_ppo_run_shows_all_that_its_log_has(tmp_path):
    extra = dict.fromkeys(
        "policy/clip_fraction policy/approx_kl value/explained_variance completions/mean_length "
        "completions/clipped_ratio time/generate time/learn tokens_per_second learning_rate rewards/a/mean "
        "rewards/a/std rewards/b/mean rewards/b/std memory/learn time/server_idle time/server_wait".split(),
        0.05,
    )
    log = [line | extra if "reward/score" in line else line for line in PPO_LOG]
    assert not seconds([Run("short", log)]).curves  # the area of one point cannot be seen
    log.append({"step": 3, "time/generate": 0.05, "time/learn": 0.05})
    page = write_report([run_folder(tmp_path / "my-run", log)]).read_text(encoding="utf-8")
    assert headings(page) == [panel.title for panel in POLICY]
    (idle,) = (panel for panel in curves_of(page)["panels"] if panel["title"] == "Idle time")
    assert [curve["label"] for curve in idle["charts"][0]["curves"]] == ["server idle", "waits for server"]
    text = text_of(page)
    assert "my-run" in text
    assert "Not yet : 1 log line has a reward" in text
    assert "first last score on held-out prompts +0.000 +1.000" in text
    assert "No alarms." in text


def test_page_of_a_dpo_run_has_the_table_before_and_after(tmp_path, undrawn):
    extra = {"kl/ref": 0.1, "preference/gradient_weight": 0.4, "tokens_per_second": 9000.0, "memory/learn": 3.0}
    log = [line | extra if "loss" in line else line for line in DPO_LOG] + [{"step": 2, "memory/evaluate": 5.0}]
    page = write_report([run_folder(tmp_path / "d", log)]).read_text(encoding="utf-8")
    drawn = [panel for panel, _ in panels_of([read_run(tmp_path / "d")])]
    assert drawn == [panel for panel in PREFERENCE if panel.title != "Learning rate and gradient"]
    text = text_of(page)
    assert "preference accuracy (95% interval) all ties 75.0% (50.0% to 87.5%)" in text
    assert "margin, mean +0.000 +1.000" in text
    assert "tokens per second 9,000 9,000 GiB at most held, of one process 5.00" in text
    assert "eval_preference/calibration_error is 0.25 lately, above 0.1" in text


def test_runs_lie_over_each_other_and_tell_apart(tmp_path):
    folders = [run_folder(tmp_path / "a" / "out", PPO_LOG), run_folder(tmp_path / "b" / "out", PPO_LOG)]
    page = write_report(folders, tmp_path / "both.html").read_text(encoding="utf-8")
    assert headings(page).count("Reward") == 1
    assert "What each term adds to the loss: a/out" in headings(page)
    assert "What each term adds to the loss: b/out" in headings(page)
    cell = "+1.000 from +0.000"
    assert f"score on held-out prompts {cell} {cell}" in text_of(page)
    (reward,) = (panel for panel in curves_of(page)["panels"] if panel["title"] == "Reward")
    assert [curve["colour"] for chart in reward["charts"] for curve in chart["curves"]] == ["blue"] * 2 + ["red"] * 2
    assert png_size(tmp_path / "both.png")[0] > 1000


def test_runs_of_several_algorithms_share_a_page(tmp_path, undrawn):
    reward_log = [{"step": 1, "loss": 0.6, "accuracy": 0.7, "margin": 0.1}]
    grpo_log = [{"step": 1, "reward": 0.5, "reward_std": 0.1, "kl": 0.01, "completions/mean_length": 5.0}]
    sft_log = [{"step": 1, "loss": 2.0, "mean_token_accuracy": 0.4}]
    logs = {"ppo": PPO_LOG, "grpo": grpo_log, "dpo": DPO_LOG, "reward": reward_log, "sft": sft_log}
    folders = [run_folder(tmp_path / name, log) for name, log in logs.items()]
    runs = [read_run(folder) for folder in folders]
    assert [run.kind for run in runs] == ["ppo", "grpo", "dpo", "reward", None]
    drawn = {panel.title: [run.name for run in of_panel] for panel, of_panel in panels_of(runs)}
    assert drawn["Reward"] == ["ppo", "grpo"]
    assert drawn["Preference accuracy"] == ["dpo", "reward"]
    assert drawn["Token accuracy"] == ["sft"]
    assert "sft" in text_of(write_report(folders, tmp_path / "all.html").read_text(encoding="utf-8"))


def test_what_models_write_does_not_become_markup(tmp_path, undrawn):
    folder = run_folder(tmp_path / "run", PPO_LOG)
    (folder / "completions").mkdir()
    evil = "<script>alert(1)</script><b>"
    for step, score in ((0, 0.5), (2, 1.5)):
        write_completions(folder / "completions", step, [("a <i>", f"{evil}{step}", score, 0.0)])
    page = write_report([folder]).read_text(encoding="utf-8")
    assert page.count("<script") == 3  # the curves, the library, the page's own
    assert evil not in page
    assert f"a <i> {evil}0 +0.50 {evil}2 +1.50" in text_of(page)


@pytest.mark.parametrize("folder", ["samples", "completions"])
def test_samples_beside_the_reference_are_shown(tmp_path, folder, undrawn):
    """As `SampleCallback` and as `DPOTrainerX` write them."""
    run = run_folder(tmp_path / "run", DPO_LOG)
    for step in (1, 2):
        write_rows(
            run / folder / f"step_{step:05d}.jsonl",
            [{"prompt": "hello", "actor": f"at {step}", "reference": "at the start"}],
        )
    assert "hello at the start at 2" in text_of(write_report([run]).read_text(encoding="utf-8"))


def test_implicit_rewards_of_pairs_are_shown_first_and_last(tmp_path, undrawn):
    run = run_folder(tmp_path / "run", DPO_LOG)
    for step, reward in ((0, 0.0), (2, 0.75)):
        row = {"prompt": "p", "chosen": "good", "rejected": "bad", "chosen_reward": reward, "rejected_reward": -reward}
        write_rows(run / "implicit_rewards" / f"step_{step:05d}.jsonl", [row])
    text = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert "p good +0.00 → +0.75 bad +0.00 → -0.75 +1.50" in text.replace("-0.00", "+0.00")


# --- where it is read from


def test_newest_state_wins_while_the_run_goes_on(tmp_path):
    run_folder(tmp_path / "checkpoint-1", PPO_LOG[:1], global_step=1, max_steps=9)
    run_folder(tmp_path / "checkpoint-2", PPO_LOG[:4], global_step=2, max_steps=9)
    run = read_run(tmp_path)
    assert (run.step, len(run.log), run.is_finished) == (2, 4, False)
    run_folder(tmp_path, [*PPO_LOG, DONE], global_step=3, max_steps=9)
    assert (read_run(tmp_path).step, read_run(tmp_path).is_finished) == (3, True)


def test_page_of_a_running_run_loads_itself_again(tmp_path, undrawn):
    running = run_folder(tmp_path, PPO_LOG[:4], max_steps=9)
    page = write_report([running], refresh=30).read_text(encoding="utf-8")
    assert '<meta http-equiv="refresh" content="30">' in page
    assert "running" in text_of(page)
    done = write_report([run_folder(tmp_path, PPO_LOG, max_steps=2)], refresh=30).read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in done


def test_what_was_trained_comes_from_the_run_or_its_models_config(tmp_path, undrawn):
    run_folder(tmp_path, PPO_LOG)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/some/model"}))
    run = read_run(tmp_path)
    assert (run.facts, run.options) == ({"model": "model"}, {})
    facts = {"model": "m", "held-out data": "2 rows", "training data": "10 rows"}
    known = {"begun": 1.0, "facts": facts, "options": {"kl_band": [1.0, 3.0], "beta": 0.1}}
    (tmp_path / "run.json").write_text(json.dumps(known))
    assert read_run(tmp_path).kl_band == (1.0, 3.0)
    text = text_of(write_report([tmp_path]).read_text(encoding="utf-8"))
    assert "model m training data 10 rows held-out data 2 rows beta 0.1" in text


def test_what_an_earlier_run_left_in_the_folder_is_not_shown(tmp_path, undrawn):
    """It came further, so a rule by steps or by names would take it."""

    def table(folder, step, text, at):
        path = tmp_path / folder / f"step_{step:05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        rewards = {"chosen": "c", "rejected": "r", "chosen_reward": 0.0, "rejected_reward": 0.0}
        path.write_text(json.dumps({"prompt": "p", "actor": text, "reference": text} | rewards | {"prompt": text}))
        os.utime(path, (at, at))

    def state(folder, step, at):
        path = run_folder(tmp_path / folder, PPO_LOG[:1], global_step=step, max_steps=step) / "trainer_state.json"
        os.utime(path, (at, at))

    def shown():
        run = read_run(tmp_path)
        return run.step, [sample.after for sample in run.samples], [pair.prompt for pair in run.pairs]

    state("checkpoint-6", 6, at=100)
    state("", 5, at=101)
    for folder in ("samples", "implicit_rewards"):
        table(folder, 0, "old", at=90)
        table(folder, 50, "old", at=100)
    assert shown() == (5, ["old"], ["old"])  # without run.json: what is newest
    (tmp_path / "run.json").write_text(json.dumps({"begun": 200.0, "facts": {}, "options": {}}))
    with pytest.raises(FileNotFoundError, match="log of an earlier run only"):
        read_run(tmp_path)
    state("checkpoint-1", 1, at=300)
    assert shown() == (1, [], [])
    for folder in ("samples", "implicit_rewards"):
        table(folder, 0, "new", at=250)
        table(folder, 2, "new", at=301)
    assert shown() == (1, ["new"], ["new"])
    assert (tmp_path / "checkpoint-6").is_dir()
    os.utime(tmp_path / "checkpoint-6", (100, 100))
    assert not is_of_this_run(tmp_path / "checkpoint-6")
    assert is_of_this_run(tmp_path / "checkpoint-1")
    assert not is_of_this_run(tmp_path / "checkpoint-9")


def test_completions_of_an_earlier_run_are_not_paired(tmp_path):
    """TRL's tables, at the steps of this run's evaluations."""
    run_folder(tmp_path, PPO_LOG)
    (tmp_path / "completions").mkdir()
    for step in (0, 2):
        write_completions(tmp_path / "completions", step, [("a", f"at {step}", 0.5, 0.0)])
    assert [sample.after for sample in read_run(tmp_path).samples] == ["at 2"]
    (tmp_path / "run.json").write_text(json.dumps({"begun": 200.0}))
    os.utime(tmp_path / "completions" / "completions_00000.parquet", (100, 100))
    assert read_run(tmp_path).samples == []


def test_half_written_log_gives_way_to_the_last_whole_one(tmp_path):
    run_folder(tmp_path / "checkpoint-1", PPO_LOG[:4], global_step=1)
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step"')
    assert read_run(tmp_path).step == 1
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("")
    with pytest.raises(
        ValueError, match=r"No log can be read: (?=.*checkpoint-1/).*trainer_state\.json .*trainer_state\.json "
    ):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    "age, every, is_silent",
    [(500, 0.1, False), (700, 0.1, True), (700, 300, False), (1000, 300, True)],
    ids=["within 10 minutes", "killed", "writes every 5 minutes", "missed 3 of them"],
)
def test_run_that_is_not_heard_of_is_silent(tmp_path, age, every, is_silent, undrawn):
    """4 log lines in 8 seconds: 20 times 2 seconds are less than 10 minutes."""
    heard = time.time() - age
    run_folder(tmp_path, PPO_LOG[:4], max_steps=9)
    os.utime(tmp_path / "trainer_state.json", (heard, heard))
    (tmp_path / "run.json").write_text(json.dumps({"begun": heard - 8, "every": every}))
    run = read_run(tmp_path)
    assert (run.is_silent, run.is_finished) == (is_silent, False)
    page = write_report([tmp_path], refresh=30).read_text(encoding="utf-8")
    assert ('http-equiv="refresh"' in page) is not is_silent
    assert (f"has not logged for {age / 60:.0f} minutes" in text_of(page)) is is_silent
    assert time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(heard)) in text_of(page)


@pytest.mark.parametrize("since, state", [(40, "running"), (60, "stopped at step 1")])
def test_run_that_was_killed_shows_as_stopped_within_a_minute(tmp_path, undrawn, since, state):
    """It no longer touches its run.json, whatever its log says."""
    run_folder(tmp_path, PPO_LOG[:4], global_step=1, max_steps=9)
    (tmp_path / "run.json").write_text(json.dumps({"begun": 200.0, "every": 120, "beats": True}))
    os.utime(tmp_path / "run.json", (time.time() - since,) * 2)
    assert read_run(tmp_path).state == state
    page = write_report([tmp_path], refresh=30).read_text(encoding="utf-8")
    assert state in text_of(page)
    assert ('http-equiv="refresh"' in page) is (state == "running")


def test_silence_is_measured_by_what_is_usual(tmp_path):
    now = time.time()

    def run(begun, lines, *written):
        for i, at in enumerate(written):
            folder = run_folder(tmp_path / f"checkpoint-{i}", PPO_LOG[:1] * lines, max_steps=9)
            os.utime(folder / "trainer_state.json", (at, at))
        if begun:
            (tmp_path / "run.json").write_text(json.dumps({"begun": begun, "every": 120}))
        return read_run(tmp_path)

    assert not run(None, 1, now - 9e5).is_silent  # nothing says how often there is a log
    assert not run(None, 1, now - 6000, now - 3000).is_silent  # a checkpoint in 50 minutes
    assert run(None, 1, now - 14000, now - 11000).is_silent
    assert not run(now - 5000, 10, now - 4000, now - 3000).is_silent  # a line in 200 s
    assert run(now - 7500, 10, now - 6500, now - 5500).is_silent
    run_folder(tmp_path / "checkpoint-1", [DONE], max_steps=9)
    os.utime(tmp_path / "checkpoint-1" / "trainer_state.json", (now - 5000, now - 5000))
    assert not read_run(tmp_path).is_silent  # finished


@pytest.mark.parametrize("name", ["x.png", "report", "report.htm"])
def test_page_has_the_suffix_of_a_page(tmp_path, name):
    folder = run_folder(tmp_path / "run", PPO_LOG)
    with pytest.raises(ValueError, match=rf"{name}' is no name of a page, which ends in \.html"):
        write_report([folder], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_folder_without_a_log_says_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no log of a run"):
        read_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"begun": 200.0, "beats": True}))
    with pytest.raises(FileNotFoundError, match=r"has written no log yet\. Look again after its next log line\."):
        read_run(tmp_path)
    os.utime(tmp_path / "run.json", (300, 300))  # as a run that was killed leaves it
    with pytest.raises(FileNotFoundError, match=r"no log yet\. It has stopped, before its first log line: start it"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="No run was given"):
        write_report([])


# --- how it is made


@pytest.mark.parametrize("log", [[], PPO_LOG, DPO_LOG, [{"step": 1, "loss": float("nan"), "kl/ref": None}]])
def test_page_is_well_formed_and_loads_nothing(log):
    pieces = [{"text": "<b>", "special": False, "advantage": [0.5]}]
    answers = [{"prompt": "p", "kind": "response", "score": None, "pieces": pieces}]
    runs = [Run("a <run>", log, credit=Credit(2, answers))]
    page = render(runs, "a <run>", charts_of(runs))
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert [link for link in parser.links if not link.startswith("#")] == []
    assert not re.search(r"@import|url\(|<link|<img", re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL))


def test_policy_of_the_page_runs_its_own_scripts_and_loads_nothing():
    page = render([Run("a", PPO_LOG)], "a", charts_of([Run("a", PPO_LOG)]))
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    texts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    assert policy == "; ".join(
        ("default-src 'none'", "style-src 'unsafe-inline'", f"script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'")
    )
    assert "MIT Licensed" in texts[0]  # the notice of the library


def test_names_in_the_curves_close_no_script():
    evil = "</script><script>alert(1)</script>&amp;"
    log = [PPO_LOG[1] | {f"rewards/{name}/{kind}": 1.0 for name in (evil, "b") for kind in ("mean", "std")}]
    runs = [Run(evil, log)]
    page = render(runs, evil, charts_of(runs))
    assert page.count("<script") == page.count("</script") == 3
    data = curves_of(page)
    assert data["runs"][0]["name"] == evil
    (sources,) = (panel for panel in data["panels"] if panel["title"] == "Rewards by source")
    assert sources["charts"][0]["curves"][0]["label"] == evil


def test_every_colour_of_a_curve_follows_dark_mode():
    """Curves name their colours; dark mode gives each name another value."""
    runs = told_apart([Run("a", PPO_LOG), Run("b", PPO_LOG)], [Path("a"), Path("b")])
    page = render(runs, "t", charts_of(runs))
    curves = [curve for panel in curves_of(page)["panels"] for chart in panel["charts"] for curve in chart["curves"]]
    assert {curve["colour"] for curve in curves} <= COLOURS.keys()
    dark = page[page.index("prefers-color-scheme: dark") :]
    for name, colour in COLOURS.items():
        assert f"--{name}: {colour}" in page
        assert re.search(rf"--{name}: (?!{colour})#", dark), name


def test_captions_say_what_is_healthy():
    panels = {panel for of_kind in (*OF_KIND.values(), OTHER) for panel in of_kind}
    assert [panel.caption for panel in panels if not re.match(r"Healthy: [^A-Z].*\.$", panel.caption)] == []


def test_long_curves_are_thinned_to_means_and_extremes():
    steps, values = list(range(1, 1001)), [float(i % 2) for i in range(1000)]
    values[123] = 7.0
    thinned = Curve("", (steps, values), "blue").thinned(100)
    assert thinned.points[0] == list(range(10, 1001, 10))  # the last step of each part
    assert [mean for mean in thinned.points[1] if mean != 0.5] == [pytest.approx(1.1)]
    assert max(thinned.high) == 7.0
    assert set(thinned.low) == {0.0}
    short = Curve("", (steps[:5], values[:5]), "blue")
    assert short.thinned(100) is short
    assert running_mean([1.0, 2.0, 6.0], 2) == [1.0, 1.5, 4.0]


@pytest.mark.parametrize("lines, most", [(1_000, 600_000), (20_000, 2_000_000)])
def test_page_of_a_long_run_is_small_and_keeps_its_extremes(lines, most):
    """With all panels; every value has as many digits as a computed one."""
    keys = {key for panel in POLICY for key in panel.keys if not key.endswith("/")} | PPO_LOG[1].keys()
    keys |= {f"{key}/{name}" for key in ("memory", "time") for name in ("generate", "score", "learn", "elapsed")}
    keys |= {f"rewards/{name}/{kind}" for name in "ab" for kind in ("mean", "std")} | {"num_tokens"}
    keys |= {f"completions/{end}_length" for end in ("min", "max")}
    log = [{key: (len(key) + i) ** 0.5 / 7 for key in keys} | {"step": i} for i in range(lines)]
    log[lines // 3]["grad_norm"], log[lines // 2]["grad_norm"] = 4321.0, -54.0
    runs = [Run("a", log)]
    page = render(runs, "a", charts_of(runs))
    assert headings(page) == [panel.title for panel in POLICY]
    assert len(page.encode()) < most
    (learning,) = (panel for panel in curves_of(page)["panels"] if panel["title"] == "Learning rate and gradient")
    norm = learning["charts"][1]["curves"][0]
    assert (max(norm["high"]), min(norm["low"]), len(norm["y"]) <= 400) == (4321.0, -54.0, True)
    assert "a/trainer_state.json" in text_of(page)


def test_curves_know_tokens_and_hours_of_a_step():
    log = [line | {"num_tokens": 100.0 * line["step"], "time/elapsed": 1800.0 * line["step"]} for line in PPO_LOG[1:3]]
    runs = told_apart([Run("a", log), Run("b", PPO_LOG)], [Path("a"), Path("b")])
    data = curves_of(render(runs, "t", charts_of(runs)))
    arrays = data["arrays"]
    assert [[arrays[i] for i in data["runs"][0][axis]] for axis in ("tokens", "hours")] == [
        [[1, 2], [100.0, 200.0]],
        [[1, 2], [0.5, 1.0]],
    ]
    assert (data["runs"][1]["tokens"], data["runs"][1]["hours"]) == (None, None)


@pytest.mark.parametrize(
    "scores, said",
    [
        ((1.0, 0.5, -0.5), "a, +1.000 (95%: +0.600 to +1.400). The intervals of b overlap with it"),
        ((1.0, 1.0, -0.5), "a, b, +1.000 (95%: +0.600 to +1.400). No other interval reaches it."),
        ((0.0, 2.0, 0.5), "b, +2.000 (95%: +1.600 to +2.400). No other interval reaches it."),
    ],
)
def test_page_of_several_runs_says_which_is_best_and_what_differs(scores, said):
    logs = [[{"step": 2, "eval_reward/score": s, "eval_reward/score_ci95": 0.4, "reward/score": s}] for s in scores]
    options = [{"seed": 1, "kl_coef": coefficient} for coefficient in (0.1, 0.2, 0.2)]
    runs = [Run(name, log, options=o) for name, log, o in zip("abc", logs, options, strict=True)]
    runs = told_apart(runs, [Path(run.name) for run in runs])
    text = text_of(render(runs, "t", charts_of(runs)))
    assert f"Highest held-out score in the last evaluation: {said}" in text
    assert "What differs a b c kl_coef 0.1 0.2 0.2 What all runs share algorithm PPO seed 1" in text


def test_script_writes_page_and_picture(tmp_path, capsys):
    folder = run_folder(tmp_path / "run", PPO_LOG)
    command("report").main([str(folder), "--output", str(tmp_path / "page.html")])
    assert "run: step 2 of 2; not yet" in capsys.readouterr().out
    assert "Reward against KL" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert png_size(tmp_path / "page.png")


def report(*words):
    command("report").main([str(word) for word in words])


def test_script_does_not_watch_a_run_that_was_killed(tmp_path, undrawn, monkeypatch, capsys):
    folder = run_folder(tmp_path / "run", PPO_LOG[:4], max_steps=3)
    os.utime(folder / "trainer_state.json", (2000, 2000))
    (folder / "run.json").write_text(json.dumps({"begun": 1990, "every": 120}))
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits for a dead run"))
    report(folder, "--watch", 7)
    assert re.search(r"step 2 of 3 \(has not logged for \d+ days\)", capsys.readouterr().out)


def test_script_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "trainer_state.json").write_text("{")
    run_folder(tmp_path / "run", PPO_LOG)
    for words, said in (
        ([tmp_path / "half"], r"error: No log can be read: .*half/trainer_state\.json"),
        ([tmp_path / "run", "--output", tmp_path / "x.png"], r"error: .*x\.png' is no name of a page"),
        ([tmp_path], "error: .* holds no log of a run"),
    ):
        with pytest.raises(SystemExit, match=said):
            report(*words)
    with pytest.raises(SystemExit):
        report(tmp_path, "--watch", -1)
    assert "`--watch` is -1" in capsys.readouterr().err


def test_parquet_of_other_prompts_is_not_shown_as_before_and_after(tmp_path):
    """GRPO without held-out prompts writes tables of training prompts only."""
    folder = run_folder(tmp_path, PPO_LOG[1:3])
    (folder / "completions").mkdir()
    Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).to_parquet(
        str(folder / "completions" / "completions_00001.parquet")
    )
    assert read_run(folder).samples == []
