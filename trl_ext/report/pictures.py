"""Which panels a run has, and PNGs of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .drawing import COLOURS, OF_RUNS, STYLE, figure, matplotlib
from .panel import LEARNING, Panel, Runs, lines
from .policy_panels import POLICY
from .preference_panels import PREFERENCE
from .run import Run


WIDTH = 4.3  # inches of a panel
OTHER = (
    Panel("Loss", lines(("loss", "training"), ylabel="loss"), ("loss",), "Falling."),
    Panel(
        "Token accuracy",
        lines(("mean_token_accuracy", "training"), ylabel="share"),
        ("mean_token_accuracy",),
        "The share of tokens that the model puts first; rising.",
    ),
    LEARNING,
)
OF_KIND = {"ppo": POLICY, "grpo": POLICY, "dpo": PREFERENCE, "reward": PREFERENCE}


def panels_of(runs: Runs) -> list[tuple[Panel, list[Run]]]:
    """The panels to draw, each with its runs, in order; those of two algorithms after each other."""
    chosen: dict[Panel, list[Run]] = {}
    for run in runs:
        for panel in OF_KIND.get(run.kind or "", OTHER):
            if panel.applies_to(run):
                chosen.setdefault(panel, []).append(run)
    found: list[tuple[Panel, list[Run]]] = []
    for panel, of_panel in chosen.items():
        found += [(panel, [run]) for run in of_panel] if panel.per_run else [(panel, of_panel)]
    return found


def write_picture(
    runs: Runs, path: str | Path, title: str = "", columns: int = 3, panels: Sequence[Panel] | None = None
) -> Path:
    """
    One PNG of the panels that the runs have something for; returns its path. Several runs are named in their colours.

    Args:
        columns: panels beside each other.
        panels: those to choose from; by default all.
    """
    shown = [(panel, of_panel) for panel, of_panel in panels_of(runs) if panels is None or panel in panels]
    columns = min(columns, max(len(shown), 1))
    rows = [shown[i : i + columns] for i in range(0, len(shown), columns)] or [[]]
    heights = [max((panel.height for panel, _ in row), default=1.0) + 0.4 for row in rows]
    with matplotlib().rc_context(STYLE):
        whole = figure(WIDTH * columns, sum(heights) + 0.5)
        grid = whole.subfigures(1 + len(rows), columns, height_ratios=[0.5, *heights], squeeze=False)
        _write_head(grid[0][0], runs, title)
        for cells, row in zip(grid[1:], rows, strict=True):
            for cell, (panel, of_panel) in zip(cells, row, strict=False):
                cell.suptitle(heading(panel, of_panel, runs), x=0.02, ha="left", fontsize=11, fontweight="bold")
                panel.draw(cell, of_panel)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.savefig(path, dpi=120)
    return path


def heading(panel: Panel, of_panel: Runs, runs: Runs) -> str:
    """A panel's title; with the run's name where only one of several runs is drawn."""
    return f"{panel.title}: {of_panel[0].name}" if panel.per_run and len(runs) > 1 else panel.title


def _write_head(head: Any, runs: Runs, title: str) -> None:
    head.text(0.02, 0.75, title, fontsize=13, fontweight="bold", va="center")
    if len(runs) > 1:
        for i, run in enumerate(runs):
            colour = COLOURS[OF_RUNS[i % len(OF_RUNS)]]
            head.text(0.02 + i / len(runs), 0.25, f"● {run.name}", color=colour, va="center")


def ppo_curves(
    log: list[dict[str, Any]], path: str | Path, title: str = "", kl_band: Sequence[float] = (0.5, 2.0)
) -> Path:
    """Reward, reward against KL, KL with its band and coefficient, and what each term adds to the loss."""
    run = Run("", log, options={"kl_band": kl_band})
    return write_picture([run], path, title, columns=2, panels=POLICY[:4])


def dpo_curves(log: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """Loss, preference accuracy, implicit rewards, their margin, the drift of both log-probabilities, calibration."""
    return write_picture([Run("", log)], path, title, columns=2, panels=PREFERENCE[:6])


def reward_curves(log: list[dict[str, Any]], path: str | Path, title: str = "") -> Path:
    """A reward model's training: Bradley-Terry loss and pair accuracy, training and held out."""
    return write_picture([Run("", log)], path, title, columns=2, panels=PREFERENCE[:2])
