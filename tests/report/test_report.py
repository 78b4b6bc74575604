"""Pictures and tables of a run: what they compute, against independent arithmetic, and that they are written."""

import re
import sys

import pytest
from tqdm.auto import tqdm
from transformers import TrainerState

from run_logs import DPO_LOG, PPO_LOG, dpo_line, png_size, write_completions
from trl_ext.report import (
    Run,
    Sample,
    accuracy_text,
    pair_samples,
    preference_table,
    print_samples,
    samples_markdown,
)
from trl_ext.report.machine_panels import stacked
from trl_ext.report.pictures import HEIGHTS, WIDTH, charts_of, write_picture
from trl_ext.report.policy_panels import contributions
from trl_ext.report.progress import DPO_LINE, PPO_LINE, BriefProgress, brief_line
from trl_ext.runs.log import is_tie, series
from trl_ext.runs.tables import counted


def test_contributions_add_up_to_the_loss():
    curves = contributions(PPO_LOG)
    assert set(curves) == {"−clip_objective", "kl_coef · kl", "vf_coef · value_loss", "−ent_coef · entropy"}
    for i, line in enumerate(line for line in PPO_LOG if "loss" in line):
        assert sum(values[i] for _, values in curves.values()) == pytest.approx(line["loss"])


def test_series_skips_lines_without_the_key_and_takes_the_last_of_a_step():
    log = [{"step": 1, "a": 1.0}, {"step": 2}, {"step": 3, "a": None}, {"step": 4, "a": 2.0}, {"step": 4, "a": 3.0}]
    assert series(log, "a") == ([1, 4], [1.0, 3.0])


@pytest.mark.parametrize("log", [PPO_LOG, DPO_LOG, [{"step": 1, "loss": 0.7, "accuracy": 0.5}]])
def test_picture_shows_the_panels_of_a_log_in_three_columns_without_gaps(tmp_path, log):
    runs = [Run("a", log)]
    panels = charts_of(runs)
    write_picture(panels, runs, tmp_path / "report.png", "a")
    width, height = png_size(tmp_path / "report.png")
    columns = [0.0] * min(3, len(panels))
    for shown in panels:
        columns[columns.index(min(columns))] += HEIGHTS[len(shown.charts)] + 0.35
    assert width == len(columns) * round(WIDTH * 120)
    assert height == pytest.approx(120 * (0.4 + max(columns)), abs=2 * len(panels) + 2)


def test_picture_of_an_empty_log_is_a_picture(tmp_path):
    write_picture([], [Run("a", [])], tmp_path / "report.png")
    assert png_size(tmp_path / "report.png")[0] == 528


def test_stack_adds_up_upwards_and_downwards():
    """By hand: what is above 0 lies on what is above 0, what is below hangs from what is below."""
    steps = [1, 2]
    curves = stacked({"a": (steps, [1.0, -1.0]), "b": (steps, [2.0, -3.0])}, {"a": "blue", "b": "red"}, "run")
    assert [(curve.label, curve.low, curve.high) for curve in curves] == [
        ("a", [0.0, 0.0], [1.0, 0.0]),
        ("b", [1.0, 0.0], [3.0, 0.0]),
        ("a", [0.0, -1.0], [0.0, 0.0]),
        ("b", [0.0, -4.0], [0.0, -1.0]),
    ]


def test_ties_are_lines_whose_margins_are_all_zero():
    assert [is_tie(line) for line in DPO_LOG] == [True, True, False, False, False]
    assert is_tie(dpo_line(1, margin=5e-6))  # rounding
    assert not is_tie(dpo_line(1, margin=0.0) | {"rewards/margins_p90": 0.1})


def test_preference_table_shows_each_evaluation_in_a_column():
    rows = preference_table({"before": DPO_LOG[0], "after": DPO_LOG[3]}).splitlines()
    assert rows == [
        "| held-out pairs | before | after |",
        "|---|---:|---:|",
        "| preference accuracy (95% interval) | all ties | 75.0% (50.0% to 87.5%) |",
        r"| accuracy, a\|b |  | 50.0% |",
        "| pairs | 128 | 128 |",
        "| loss, nats | 0.5000 | 0.5000 |",
        "| implicit reward of chosen, mean ± std | +0.000 ± 0.125 | +0.500 ± 0.125 |",
        "| implicit reward of rejected, mean ± std | +0.000 ± 0.250 | -0.500 ± 0.250 |",
        "| margin, mean | +0.000 | +1.000 |",
        "| margin, 10%, 50%, 90% of pairs | +0.000, +0.000, +0.000 | +1.000, +1.000, +1.000 |",
        "| Bradley-Terry calibration error |  | 0.250 |",
        "| log π_θ − log π_ref of chosen, nats | +0.00 | +5.00 |",
        "| log π_θ − log π_ref of rejected, nats | +0.00 | -5.00 |",
    ]
    assert accuracy_text(DPO_LOG[2]) == accuracy_text(DPO_LOG[3])  # with `eval_` and without


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'trl-ext\[report\]'"):
        write_picture([], [Run("a", PPO_LOG)], tmp_path / "report.png")


def test_samples_pair_the_prompts_of_both_steps(tmp_path):
    write_completions(tmp_path, 0, [("a", "x", 0.5, 9.0), ("b", "y", -1.0, 9.0), ("only before", "z", 0.0, 9.0)])
    write_completions(tmp_path, 12, [("b", "trained on", 7.0, 9.0), ("a", "xx", 1.5, 9.0), ("b", "yy", 2.0, 9.0)])
    assert pair_samples(tmp_path, 0, 12) == [Sample("a", "x", "xx", 0.5, 1.5), Sample("b", "y", "yy", -1.0, 2.0)]


def test_samples_of_conversations_show_the_last_message(tmp_path):
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    for step, answer in ((0, "no"), (1, "yes")):
        write_completions(tmp_path, step, [(prompt, [{"role": "assistant", "content": answer}], 1.0, 0.0)])
    assert pair_samples(tmp_path, 0, 1) == [Sample("hello", "no", "yes", 1.0, 1.0)]


def test_tables_keep_what_models_write_out_of_their_markup(capsys):
    sample = Sample("a | b", "<b>one\ntwo [/red] [bold]", "fine", -0.25, 1.0)
    rows = samples_markdown([sample]).splitlines()
    assert rows[-1] == r"| a \| b | &lt;b>one ⏎ two [/red] [bold] | -0.25 | fine | +1.00 |"
    print_samples([sample])
    printed = capsys.readouterr().out
    assert "[bold]" in printed
    assert "+1.00" in printed
    print_samples([Sample("a", "the answer", "the answer", -0.001, 0.0)])
    printed = capsys.readouterr().out
    assert printed.count("the answer") == 1
    assert "(the same)" in printed
    assert "-0.00" not in printed


def test_brief_line_shows_what_the_log_has():
    assert brief_line(PPO_LOG[1], PPO_LINE) == "reward +0.100  KL 0.200  kl_coef 0.2  loss +0.6700"
    assert brief_line(DPO_LOG[2], DPO_LINE) == (
        "loss 0.5000  accuracy 0.750  margin +1.000  chosen drift +5.00  rejected drift -5.00"
    )
    assert brief_line({"reward/score": None, "other": 1}, PPO_LINE) == ""


def test_brief_line_says_ties_as_the_summary_does():
    for line in DPO_LOG[:4]:
        ties = accuracy_text(line) == "all ties"
        assert ("accuracy all ties" in brief_line(line, DPO_LINE)) == ties
    assert brief_line(DPO_LOG[0], DPO_LINE).startswith(
        "held-out loss 0.5000  held-out accuracy all ties  margin +0.000"
    )


def test_line_of_an_evaluation_clears_its_bar_first_and_has_no_zero_below_0(capsys):
    progress = BriefProgress(PPO_LINE)
    progress.prediction_bar = tqdm(total=1)
    assert "0/1" in capsys.readouterr().err
    state = TrainerState(global_step=1, max_steps=1)
    progress.on_log(None, state, None, {"eval_kl/ref": -1e-9})
    said = capsys.readouterr()
    assert said.out == "step 1/1  KL 0.000\n"
    assert re.match(r"\r +\r", said.err)
    progress.prediction_bar.close()


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "process", "1 process"),
        (0, "process", "0 processes"),
        (2, "mini-batch", "2 mini-batches"),
        (2, "epoch", "2 epochs"),
        (1, "optimizer step", "1 optimizer step"),
    ],
)
def test_number_has_its_noun_in_the_singular_or_plural(number, noun, text):
    assert counted(number, noun) == text
