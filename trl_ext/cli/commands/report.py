"""
Write a page and a picture about one run or several, from their logs; also while they run.

    trl-ext report outputs/ppo-demo                        # outputs/ppo-demo/report.html and .png
    trl-ext report outputs/ppo-demo outputs/ppo-head       # report.html here, with both runs in the same plots
    trl-ext report outputs/ppo-demo --watch 60             # again every minute, until the run is done or silent

A run is its `output_dir`. Its log is the newest `trainer_state.json` there or in its checkpoints; `ReportCallback`
keeps one up to date, with `run.json`, what was trained on what. A run is silent when its log has not been written for
10 minutes, and for 20 times what a log line usually takes. The page loads nothing from the network, so it can be sent
as a file.
"""

import shlex
import time
from pathlib import Path

from ..errors import usage_errors
from ..flags import CommandParser


def arguments() -> CommandParser:
    parser = CommandParser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folder of a run")
    output = "file for the page; the PNG is written beside it"
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=output)
    watch = "write the page again this often, until every run is done or silent"
    parser.add_argument("--watch", type=int, default=0, metavar="SECONDS", help=watch)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    given = parser.parse_args(argv)
    if given.watch < 0:
        parser.error(f"`--watch` is {given.watch}; it must be 0, for once, or a number of seconds.")
    from ...report.page import page_of, require_page, write_page  # late: `--help` need not wait for it
    from ...report.run import read_runs

    while True:
        try:
            with usage_errors():
                require_page(given.output)
                runs = read_runs(given.runs)
                page = write_page(runs, given.output or page_of(given.runs), refresh=given.watch)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"error: {error}") from None
        for run in runs:
            silent = f" ({run.state})" if run.is_silent else ""
            print(f"{run.name}: step {run.step} of {run.max_steps}{silent}; {run.verdict}", flush=True)
        quoted = shlex.quote(str(page))
        print(f"Everything is in {quoted} and {page.with_suffix('.png').name}; look: open {quoted}", flush=True)
        if not given.watch or all(run.is_finished or run.is_silent for run in runs):
            return
        time.sleep(given.watch)
