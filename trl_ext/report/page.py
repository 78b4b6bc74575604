"""Write one self-contained HTML page about one run or several: it loads nothing, and runs its own script only."""

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runs.folder import write_whole
from .chart import MOST_POINTS
from .credit import ABOVE_0, BELOW_0, NUMBERS, STRONGEST, prompt_text, tokens
from .drawing import COLOURS
from .embedded import curves_json, policy, scripts, style
from .pictures import Shown, charts_of, write_picture
from .results import choice, result_rows, rows_of, side_by_side
from .run import Run, read_runs
from .tables import score_text


TEMPLATE = Path(__file__).with_name("page.html")
NAMES = {"ppo": "PPO", "grpo": "GRPO or RLOO", "dpo": "DPO", "reward": "reward model", "critic": "value pretraining"}
SHOWN_FACTS = (
    *("algorithm", "model", "architecture", "parameters", "trained", "rewards"),
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
        raise ValueError("No run was given; name the output folder of at least one.")
    require_page(path)
    return write_page(read_runs(folders), page_of(folders) if path is None else Path(path), refresh, picture)


def require_page(path: str | Path | None) -> None:
    """Raise `ValueError` for a path that does not end in .html."""
    if path is not None and Path(path).suffix != ".html":
        raise ValueError(
            f"{str(path)!r} is no name of a page, which ends in .html: write `--output "
            f"{shlex.quote(str(Path(path).with_suffix('.html')))}`; the picture, a .png, lies beside it."
        )


def page_of(folders: Sequence[str | Path]) -> Path:
    """Return where the page of runs goes unless it is said: into the folder of the one, or here for several."""
    return Path(folders[0] if len(folders) == 1 else ".", "report.html")


def write_page(runs: Sequence[Run], page: Path, refresh: int = 0, picture: bool = True) -> Path:
    """Write the page of runs that have been read, and a PNG of the same name beside it; return the page."""
    page.parent.mkdir(parents=True, exist_ok=True)
    title = " · ".join(run.name for run in runs)
    panels = charts_of(runs)
    if picture:
        write_picture(panels, runs, page.with_suffix(".png"), title)
    text = render(runs, title, panels, refresh)
    write_whole(page, lambda part: part.write_text(text, encoding="utf-8"))  # a browser may be reading it
    return page


def render(runs: Sequence[Run], title: str, panels: Sequence[Shown], refresh: int = 0) -> str:
    """Return the text of the page, with its panels."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    running = any(not run.is_finished and not run.is_silent for run in runs)
    texts = scripts()
    names = [run.name for run in runs]
    facts = _rows([_facts(run) for run in runs])
    options = _rows([{k: _text(v) for k, v in sorted(run.options.items())} for run in runs])
    if len(runs) > 1:
        shared = [row for row in (*facts, *options) if _is_shared(row)]
        facts = [row for row in facts if not _is_shared(row)]
        told = {row[0] for row in facts}
        facts += [row for row in options if not _is_shared(row) and row[0] not in told]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        runs=runs,
        kinds=NAMES,
        light=COLOURS,
        above=" ".join(map(str, ABOVE_0)),
        below=" ".join(map(str, BELOW_0)),
        strongest=STRONGEST,
        numbers=NUMBERS,
        tokens=tokens,
        prompt_text=prompt_text,
        refresh=refresh if running else 0,
        facts=facts,
        options=options if len(runs) == 1 else [[row[0], row[1]] for row in {row[0]: row for row in shared}.values()],
        panels=panels,
        results=result_rows(runs[0]) if len(runs) == 1 else side_by_side(runs),
        choice=choice(runs),
        number_of={name: i for i, name in enumerate(names)},
        most=MOST_POINTS,
        policy=policy(texts),
        library_style=style(),
        curves=curves_json(panels, runs),
        scripts=texts,
        score_text=score_text,
        time_text=lambda seconds: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)),
    )


def _facts(run: Run) -> dict[str, str]:
    facts: dict[str, str] = {"algorithm": NAMES.get(run.kind or "", "unknown"), **run.facts}
    shown = {name: facts[name] for name in SHOWN_FACTS if name in facts}
    shown |= {name: value for name, value in facts.items() if name not in shown}
    return shown | {name: _text(run.options[name]) for name in SHOWN_OPTIONS if name in run.options}


def _rows(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Return one row for each name that any column has, with the value of every column."""
    return [[name, *(column.get(name, "") for column in columns)] for name in rows_of(columns)]


def _is_shared(row: Sequence[str]) -> bool:
    """Return whether all runs have the same value in a row."""
    return len(set(row[1:])) == 1


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
