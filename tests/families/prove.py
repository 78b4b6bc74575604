"""
Every family of transformers through both trainers, each in a process of its own; what came out goes into a table.

Results are lines of JSON in `build/`, in a file named after all that they depend on: an interrupted proof goes on.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl

from . import table
from .configs import families
from .prove_one import Result, prove
from .verdict import NOISE


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180  # for one family


def in_own_process(family: str) -> Result:
    """`prove` in a fork of this process, which may crash or hang."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_send, args=(send, family))
    child.start()
    send.close()
    try:
        if not receive.poll(SECONDS):
            return {"family": family, "not built": f"it took more than {SECONDS} seconds"}
        return receive.recv()
    except EOFError:
        child.join()
        return {"family": family, "not built": f"its process ended with code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _send(pipe: multiprocessing.connection.Connection, family: str) -> None:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        pipe.send(prove(family, NOISE))


def verdicts(result: Result) -> list[dict[str, Any]]:
    return [verdict for trainer in ("dpo", "ppo") for verdict in result.get(trainer, {}).values()]


def summary(result: Result) -> str:
    """A line about a family, for the progress."""
    if "not built" in result:
        return f"not built: {result['not built'][:90]}"
    cells = zip(table.HEADINGS, table.COLUMNS, strict=True)
    return "; ".join(f"{heading}: {table.cell(result, *column)}" for heading, column in cells)


def fingerprint() -> str:
    """Of everything that the results depend on."""
    files = sorted([*ROOT.glob("trl_ext/**/*.py"), *ROOT.glob("tests/families/*.py"), ROOT / "tests/helpers/plain.py"])
    versions = f"{transformers.__version__} {trl.__version__} {torch.__version__} {NOISE}".encode()
    return hashlib.sha256(b"".join([versions, *(path.read_bytes() for path in files)])).hexdigest()[:12]


def quiet() -> None:
    """One thread, and nothing printed but the progress."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def known_results(path: Path) -> list[Result]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these, and no page")
    options = parser.parse_args()
    quiet()
    path = ROOT / "build" / f"families-{fingerprint()}.jsonl"
    results = known_results(path)
    known = {result["family"] for result in results}
    wanted = [family for family in options.families or families() if family not in known]
    for number, family in enumerate(wanted, 1):
        start = time.monotonic()
        results.append(in_own_process(family))
        with path.open("a") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(f"{number}/{len(wanted)} {family} ({time.monotonic() - start:.1f} s) {summary(results[-1])}", flush=True)
    if not options.families:
        (ROOT / "docs" / "families.md").write_text(table.page(results), encoding="utf-8")
        print(f"docs/families.md is written; the results are in {path}")
    sys.exit(any(verdict["outcome"] in table.BAD for result in results for verdict in verdicts(result)))


if __name__ == "__main__":
    main()
