"""Write one self-contained HTML page about one run or several: it loads nothing and runs no script."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.folder import write_whole
from ..runs.log import Series, held_out_accuracy, memory, reference_kl, scores, series
from .credit import ABOVE_0, BELOW_0, NUMBERS, STRONGEST, prompt_text, tokens
from .drawing import COLOURS, OF_RUNS, STYLE, inline_svg, matplotlib
from .pictures import Drawn, draw, write_picture
from .run import Run, name_apart, read_run
from .tables import preference_rows, score_text


TEMPLATE = Path(__file__).with_name("page.html")
NAMES = {"ppo": "PPO", "grpo": "GRPO or RLOO", "dpo": "DPO", "reward": "reward model", "critic": "value pretraining"}
SHOWN_FACTS = (
    *("algorithm", "model", "architecture", "parameters", "trained"),
    *("training data", "held-out data", "hardware"),
)
# Options that decide most, in the order of the page; all others that were changed are listed below.
SHOWN_OPTIONS = (
    *("learning_rate", "critic_learning_rate", "num_train_epochs", "max_steps", "total_episodes", "seed"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_ppo_epochs", "num_mini_batches"),
    *("response_length", "max_completion_length", "max_length", "temperature", "beta", "loss_type"),
    *("kl_coef", "kl_placement", "kl_estimator", "kl_controller", "cliprange", "vf_coef", "ent_coef", "gamma", "lam"),
)


def write_report(
    folders: Sequence[str | Path], path: str | Path | None = None, refresh: int = 0, picture: bool = True
) -> Path:
    """
    Read runs and write the page, and a PNG of the same name beside it.

    Args:
        folders: output folders of runs.
        path: where the page goes; by default `report.html` in the folder of the run, or here for several.
        refresh: seconds after which the page of a run that is not finished reloads itself; 0: never.
        picture: whether to write the PNG.

    Raises:
        ValueError: without a run, for a path that does not end in .html, or for logs that cannot be read.
        FileNotFoundError: for a folder without a log.
    """
    if not folders:
        raise ValueError("No run was given; name the `output_dir` of at least one.")
    if path is not None and Path(path).suffix != ".html":
        raise ValueError(f"{path} is no name of a page; give one that ends in .html, and the picture lies beside it.")
    places = [Path(folder) for folder in folders]
    runs = name_apart([read_run(place) for place in places], places)
    page = Path(path) if path is not None else (places[0] if len(places) == 1 else Path()) / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    title = " · ".join(run.name for run in runs)
    drawn = draw(runs)
    if picture:
        write_picture(drawn, runs, page.with_suffix(".png"), title)
    text = render(runs, title, drawn, refresh)
    write_whole(page, lambda part: part.write_text(text, encoding="utf-8"))  # a browser may be reading it
    return page


def render(runs: Sequence[Run], title: str, drawn: Sequence[Drawn], refresh: int = 0) -> str:
    """Return the text of the page, with its drawn panels."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    running = any(not run.is_finished and not run.is_silent for run in runs)
    with matplotlib().rc_context(STYLE):
        figures = [
            {"title": d.heading, "caption": d.panel.caption, "svg": inline_svg(d.figure, f"panel-{i}")}
            for i, d in enumerate(drawn)
        ]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        runs=runs,
        kinds=NAMES,
        colours=OF_RUNS,
        light=COLOURS,
        above=" ".join(map(str, ABOVE_0)),
        below=" ".join(map(str, BELOW_0)),
        strongest=STRONGEST,
        numbers=NUMBERS,
        tokens=tokens,
        prompt_text=prompt_text,
        refresh=refresh if running else 0,
        facts=_rows({run.name: _facts(run) for run in runs}),
        figures=figures,
        results=_results(runs),
        options=_rows({run.name: {k: _text(v) for k, v in sorted(run.options.items())} for run in runs}),
        score_text=score_text,
        time_text=lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
    )


def _results(runs: Sequence[Run]) -> list[list[str]]:
    """Return the rows with their heading: first and last value of one run, or a column for each of several."""
    if len(runs) == 1:
        return [["", "first", "last"], *result_rows(runs[0])]
    columns = {
        run.name: {name: f"{first} → {last}" if first else last for name, first, last in result_rows(run)}
        for run in runs
    }
    return [["first → last", *columns], *_rows(columns)]


def result_rows(run: Run) -> list[list[str]]:
    """Return name, value at the first and at the last evaluation; of training, at the first and the last line."""
    rows = []
    accuracy = held_out_accuracy(run.log)
    evaluations = [line for line in run.log if accuracy in line]
    if run.kind == "dpo" and evaluations and "eval_preference/accuracy_low" in evaluations[0]:
        rows = preference_rows([evaluations[0], evaluations[-1]])
    else:
        for label, points, form in (
            ("score on held-out prompts", series(run.log, "eval_reward/score"), "{:+.3f}"),
            ("95% half-width of the score", series(run.log, "eval_reward/score_ci95"), "{:.3f}"),
            ("rise, paired by prompt", series(run.log, "eval_reward/rise"), "{:+.3f}"),
            ("95% half-width of the rise", series(run.log, "eval_reward/rise_ci95"), "{:.3f}"),
            ("held-out KL, nats per sequence", series(run.log, "eval_kl/ref"), "{:.2f}"),
            ("score in training", scores(run.log), "{:+.3f}"),
            ("KL in training, nats per sequence", reference_kl(run.log), "{:.2f}"),
            ("held-out accuracy", series(run.log, accuracy or ""), "{:.1%}"),
            ("held-out loss", series(run.log, "eval_loss"), "{:.4f}"),
            ("loss", series(run.log, "loss"), "{:.4f}"),
            ("tokens per response", series(run.log, "completions/mean_length"), "{:.1f}"),
            ("entropy, nats per token", series(run.log, "terms/entropy"), "{:.3f}"),
        ):
            rows += _first_and_last(label, points, form)
    rows += _first_and_last("tokens per second", series(run.log, "tokens_per_second"), "{:,.0f}")
    steps, peaks = memory(run.log)
    rows += _first_and_last("GiB at most held, of one process", (steps[-1:], [max(peaks)] if peaks else []), "{:.2f}")
    return rows + _first_and_last("seconds of training", series(run.log, "train_runtime"), "{:.0f}")


def _first_and_last(label: str, points: Series, form: str) -> list[list[str]]:
    """Return a row of the first and the last value; a single value is the last; no row without a value."""
    values = points[1]
    if not values:
        return []
    return [[label, form.format(values[0]) if len(values) > 1 else "", form.format(values[-1])]]


def _facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {"algorithm": NAMES.get(run.kind or "", "unknown"), **run.facts}
    shown = {name: facts[name] for name in SHOWN_FACTS if name in facts}
    shown |= {name: value for name, value in facts.items() if name not in shown}
    return shown | {name: _text(run.options[name]) for name in SHOWN_OPTIONS if name in run.options}


def _rows(columns: Mapping[str, Mapping[str, str]]) -> list[list[str]]:
    """Return one row for each name that any column has, with the value of every column."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return [[name, *(column.get(name, "") for column in columns.values())] for name in names]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
