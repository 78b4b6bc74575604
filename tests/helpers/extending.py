"""Worked examples of docs/architecture.md: read from the page, applied to a copy of the package, run in a process."""

import functools
import multiprocessing
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "architecture.md"
SECTION = "Where a new … goes"


class Edit(NamedTuple):
    """One diff block: a file, and for each of its hunks the lines that must be there and those that replace them."""

    path: str
    hunks: list[tuple[str, str]]


def worked_examples() -> dict[str, list[Edit]]:
    """Heading -> edits of every worked example of the page."""
    text = PAGE.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^## {re.escape(SECTION)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    parts = re.split(r"^### (.+)\n", section, flags=re.MULTILINE)[1:]
    return {heading: edits(body) for heading, body in zip(parts[::2], parts[1::2], strict=True)}


def edits(markdown: str) -> list[Edit]:
    """The ```diff blocks of a text, each headed by `+++ FILE`."""
    blocks = re.findall(r"^```diff\n\+\+\+ (\S+)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [
        Edit(path, [_hunk(part) for part in re.split(r"^@@.*\n", body, flags=re.M) if part]) for path, body in blocks
    ]


def _hunk(lines: str) -> tuple[str, str]:
    old = new = ""
    for line in lines.splitlines():
        kind, rest = line[:1] or " ", line[1:] + "\n"
        assert kind in " +-", f"a line of a diff begins with a space, + or -, and this one does not: {line!r}"
        old += rest if kind in " -" else ""
        new += rest if kind in " +" else ""
    return old, new


def apply(edit: Edit, root: Path) -> None:
    """Makes one edit below `root`. What a hunk keeps or removes must be in its file once; a new file has no such."""
    path = root / edit.path
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for old, new in edit.hunks:
        if path.exists():
            assert text.count("\n" + old) == 1, f"{edit.path} holds {text.count(old)} times, not once:\n{old}"
            text = text.replace("\n" + old, "\n" + new)
        else:
            assert not old, f"{edit.path} is not there, and its diff expects it to hold:\n{old}"
            text += new
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def extended_copy(heading: str, folder: Path) -> Path:
    """A copy of the package in `folder`, with the worked example of this heading applied."""
    shutil.copytree(ROOT / "trl_ext", folder / "trl_ext", ignore=shutil.ignore_patterns("__pycache__"))
    for edit in worked_examples()[heading]:
        apply(edit, folder)
    return folder


def run_in(copy: Path, code: str, **names: Any) -> Any:
    """
    Runs `code` where `trl_ext` is the one in `copy`, in a process of its own, forked from one that has imported what
    `trl_ext` needs; returns what it calls `result`.
    """
    return _server().submit(_execute, str(copy), code, names).result()


@functools.cache
def _server() -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl.trainer.grpo_trainer", "trl.trainer.dpo_trainer", "peft", "datasets"])
    return ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1)


def _execute(copy: str, code: str, names: dict[str, Any]) -> Any:
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, copy)
    import trl_ext

    assert Path(trl_ext.__file__).is_relative_to(copy), f"{trl_ext.__file__} is not the copy"
    exec(compile(code, "<worked example>", "exec"), names)
    return names["result"]
