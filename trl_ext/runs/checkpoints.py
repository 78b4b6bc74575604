"""
A checkpoint is complete or absent: written beside, synced to disk, listed in a manifest, then renamed.

    output_dir/checkpoint-N              complete, with manifest.json: the size of every file, the sha256 of most
    output_dir/_saving/checkpoint-N      being written, or left by a run that was killed; removed by the next save
    output_dir/_replaced/checkpoint-N    moved aside for a new one of the same step, for the moment between two renames

The names begin with "_" because the Trainer does not push such folders, and takes no checkpoint from them.

Where folders cannot be renamed, as on file systems over buckets, files are copied instead, trainer_state.json last:
without it a folder is taken for no checkpoint.
"""

import errno
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, is_peft_model
from safetensors import safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from .folder import STATE, is_of_this_run


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SAVING, REPLACED = "_saving", "_replaced"
DIGESTS = ("small", "full")  # values of `checkpoint_digest`
SMALL = 2**30  # bytes; larger files have a sha256 with "full" only
READERS = 8  # files that are read at once; each takes a core, at about 1 GB/s
# Errors of renaming that copying would meet, too.
NO_COPY_EITHER = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT, errno.EIO)
# Files of which a checkpoint has one, of a run that trains an adapter, and of one that trains the whole model.
ADAPTER_WEIGHTS = "adapter_model.*"
WHOLE_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
# What of an adapter's config decides its weights' shapes and what they are multiplied by.
OF_AN_ADAPTER = ("peft_type", "r", "lora_alpha", "target_modules", "use_rslora", "use_dora")
_NAME = re.compile(r"checkpoint-(\d+)")


# ---- Write ----


def begin(staged: Path) -> None:
    """Remove what earlier saves have left unfinished in the run's folder, and make the folder of a new one."""
    run = staged.parents[1]
    put_back(run)
    for leftover in (staged, run / SAVING, run / REPLACED):  # `_saving` may be a link to another disk
        shutil.rmtree(leftover, ignore_errors=True)
    staged.mkdir(parents=True, exist_ok=True)  # a network disk may keep what is open elsewhere


def complete(staged: Path, digest: str, by: dict[str, Any] | None = None) -> Path:
    """
    Sync a checkpoint that is written, list its files, and move it into the run's folder; return its new place.

    Args:
        by: of the run, what `written_by` says.
    """
    paths = [path for path in _files(staged) if path != staged / MANIFEST]
    with ThreadPoolExecutor(READERS) as readers:
        entries = list(readers.map(functools.partial(_synced, digest=digest), paths))
    files = {path.relative_to(staged).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"version": 1, **(by or {}), "files": files}, indent=1), encoding="utf-8")
    for path in (manifest, *(folder for folder in staged.glob("**/") if folder != staged), staged):
        _sync(path)
    run = staged.parents[1]
    final, old = run / staged.name, run / REPLACED / staged.name
    if final.exists():  # of an earlier run, or of a resumed one that has come here before
        old.parent.mkdir(exist_ok=True)
        if not _renamed(final, old):
            _remove(final)
    if not _renamed(staged, final):
        _copy(staged, final)
    _sync(run)
    for leftover in (old.parent, staged, staged.parent):
        shutil.rmtree(leftover, ignore_errors=True)
    return final


def put_back(run: Path) -> None:
    """Move back the checkpoint that a run was about to replace when it was killed."""
    for old in (run / REPLACED).glob("checkpoint-*"):
        new = run / old.name
        if (old / STATE).is_file() and not (new / STATE).is_file():
            shutil.rmtree(new, ignore_errors=True)  # half copied
            old.rename(new)


def leave_unfinished(staged: Path) -> None:
    """Remove what was written of a checkpoint that could not be finished; it may be what has filled the disk."""
    shutil.rmtree(staged.parent, ignore_errors=True)
    with suppress(OSError):
        put_back(staged.parents[1])


def _renamed(folder: Path, place: Path) -> bool:
    """Rename a folder; return whether this file system can."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno in NO_COPY_EITHER:
            raise
        return False
    return True


def _copy(checkpoint: Path, place: Path) -> None:
    """Copy a checkpoint to a place where there is none; what says that it is one comes last."""
    last = checkpoint / STATE
    for path in [*(path for path in _files(checkpoint) if path != last), last]:
        copy = place / path.relative_to(checkpoint)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        _sync(copy)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint where it is; first what says that it is one."""
    (checkpoint / STATE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints of a run beyond `limit`; never the newest one, which is complete, or the best."""
    run = newest.parent
    kept = {newest, Path(best)} if best else {newest}
    steps = numbered(run)
    folders = sorted((run / name for name in steps), key=lambda path: (path.stat().st_mtime_ns, steps[path.name]))
    deletable = [path for path in folders if path not in kept]
    surplus = len(folders) - max(limit, len(kept)) if limit is not None and limit > 0 else 0
    for path in deletable[: max(0, surplus)]:
        _delete(path)


def delete_all_but(kept: str, run: Path) -> None:
    """Delete the checkpoints of a run that has ended, except the best."""
    for path in (run / name for name in numbered(run)):
        if not path.samefile(kept):
            _delete(path)


def _delete(checkpoint: Path) -> None:
    # Half deleted under its own name it could be taken for a checkpoint.
    doomed = checkpoint.parent / SAVING / checkpoint.name
    try:
        doomed.parent.mkdir(exist_ok=True)
        is_moved = _renamed(checkpoint, doomed)
    except OSError:  # a full disk has no room for a folder
        is_moved = False
    if is_moved:
        shutil.rmtree(doomed.parent, ignore_errors=True)
    else:
        _remove(checkpoint)


def size_of(checkpoint: Path) -> int:
    """Return the bytes of all files of a checkpoint."""
    return sum(path.stat().st_size for path in _files(checkpoint))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("**/*") if path.is_file())


def _synced(path: Path, digest: str) -> dict[str, Any]:
    """Write a file through to the disk; return its entry in the manifest. `OSError` for one that was cut."""
    _sync(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip and not zipfile.is_zipfile(path):  # torch 2.9 says nothing when the last bytes could not be written
        raise OSError(f"{path.name} was not written to its end")
    size = path.stat().st_size
    return {"size": size, "sha256": _sha256(path)} if digest == "full" or size <= SMALL else {"size": size}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- Check ----


def fault_of(checkpoint: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """
    Return what is wrong with a checkpoint, as the end of a sentence that names the file; `None` if it is complete.

    Args:
        share: (i, n): of the files whose content is compared, read every n-th, from the i-th on.
    """
    try:
        return _fault_of(checkpoint, share)
    except OSError as error:  # another user's, or of a disk that fails
        name = os.path.relpath(error.filename or checkpoint, checkpoint)
        return f"its {name} cannot be read ({type(error).__name__})"


def _fault_of(checkpoint: Path, share: tuple[int, int]) -> str | None:
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / STATE).is_file():
        return f"it has no {STATE}"
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return next(_faults_to_be_seen(checkpoint), None)
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["size"]) for name, entry in files.items()}
        digests = {name: entry["sha256"] for name, entry in files.items() if "sha256" in entry}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    if STATE not in sizes:
        return f"its {MANIFEST} does not list {STATE}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"it has no {name}"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size} bytes of {size}"
    for name in list(digests)[share[0] :: share[1]]:
        status = (checkpoint / name).stat()
        if _known_sha256(checkpoint / name, status.st_size, status.st_mtime_ns, status.st_ino) != digests[name]:
            return f"its {name} is not what was saved: its sha256 is another"
    return None


@functools.lru_cache(maxsize=4096)
def _known_sha256(path: Path, *status: int) -> str:
    """Return the sha256 of a file; it is read once, as a command and its trainer both check the checkpoint."""
    return _sha256(path)


def _faults_to_be_seen(checkpoint: Path) -> Iterator[str]:
    """Yield what is wrong with a checkpoint of an earlier version, whose files say themselves if they were cut."""
    weights = list(checkpoint.glob("model*.safetensors"))
    if weights and not (checkpoint / "config.json").is_file():
        yield "it has no config.json"
    for path in _files(checkpoint):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
        except Exception as error:  # each format has its own
            yield f"its {path.relative_to(checkpoint).as_posix()} cannot be read ({type(error).__name__})"


# ---- The run ----


def written_by(args: Any) -> dict[str, Any]:
    """Return what a manifest says of a run: what it is, its processes, and the rows of a step over all of them."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    algorithm = getattr(args, "ALGORITHM", None)  # TRL's own configs have none
    return {"algorithm": algorithm, "processes": args.world_size, "rows_per_step": rows}


def processes_of(checkpoint: Path) -> int | None:
    """Return how many processes have written a checkpoint; `None` for one of an earlier version."""
    return _manifest(checkpoint).get("processes")


def require_same_run(checkpoint: Path, args: Any) -> None:
    """
    Raise `ValueError` for the checkpoint of another algorithm, or if a run of other processes than these cannot go on
    from it with the same rows: where each has a state or a share of the weights of its own, or an optimizer step would
    have more rows, or fewer.
    """
    saved, now = _manifest(checkpoint), written_by(args)
    before, here = (each.get("algorithm") for each in (saved, now))
    if None not in (before, here) and before != here:
        raise ValueError(
            f"{checkpoint} was saved by {before}, and this run is {here}. Give a checkpoint of {here}, or start a "
            "new run from this one's model (`model`)."
        )
    if saved.get("processes") in (None, args.world_size):
        return
    said = f"{checkpoint} was saved by a run of {saved['processes']} processes, and this one has {args.world_size}."
    if getattr(args, "STATE_BY_PROCESS", False):
        raise ValueError(
            f"{said} PPO keeps rollout and random numbers by process. Launch it with {saved['processes']}, or start a "
            "new run from the checkpoint's actor (`model`) and `critic/` (`value_model`)."
        )
    if args.deepspeed_plugin is not None or args.fsdp:
        raise ValueError(
            f"{said} DeepSpeed and FSDP save the optimizer in as many parts. Launch it with {saved['processes']}, or "
            "start a new run from the checkpoint's model."
        )
    if saved["rows_per_step"] != now["rows_per_step"]:
        raise ValueError(
            f"{said} An optimizer step had {saved['rows_per_step']} rows and would have {now['rows_per_step']}, so "
            "that the run would go on at another place in the data. Keep `per_device_train_batch_size` × "
            f"`gradient_accumulation_steps` × processes at {saved['rows_per_step']}, or launch it with "
            f"{saved['processes']}."
        )


def _manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- Choose ----


def checkpoint_of(given: str | bool | None, output_dir: str | Path) -> Path | None:
    """
    Return the checkpoint to resume from, for `True` the newest complete one in `output_dir`; `None` for a new run.
    All ranks call it, each compares a part of the files, and all get the same answer.

    Raises:
        ValueError: when the checkpoint is not complete, with the file, or none is.
    """
    if not given or str(given).lower() == "false":
        return None
    if str(given).lower() != "true":
        folder = Path(str(given))
        _recover(folder.parent)
        fault = agreed_fault(folder)
        if fault is not None:
            others = [f"`resume_from_checkpoint={str(folder.with_name(name))!r}`" for name in numbered(folder.parent)]
            others = [other for other in sorted(others) if repr(str(folder)) not in other]
            there = f"Beside it is {' and '.join(others)}. " if others else ""
            raise ValueError(
                f"`resume_from_checkpoint` is {str(folder)!r}, and {fault}. {there}`resume_from_checkpoint=True` "
                "takes the newest complete one in `output_dir`; without the option the run starts anew."
            )
    else:
        folder = _newest(Path(output_dir))
    if not (folder / MANIFEST).is_file() and PartialState().is_main_process:
        _warn_of_earlier_version(folder)
    return folder


@functools.cache  # a command asks for the checkpoint, and then its trainer
def _warn_of_earlier_version(folder: Path) -> None:
    logger.warning(
        "%s has no %s, like those of earlier versions: its files open, but were not compared with what was saved.",
        *(folder, MANIFEST),
    )


def numbered(run: Path) -> dict[str, int]:
    """Return the names of a run's checkpoints and their steps."""
    names = {path.name: _NAME.fullmatch(path.name) for path in run.glob("checkpoint-*") if path.is_dir()}
    return {name: int(match[1]) for name, match in names.items() if match}


def _newest(run: Path) -> Path:
    faults: list[str] = []
    _recover(run)
    there = dict(_over_ranks(list(numbered(run).items())))
    for name in sorted(there, key=lambda name: there[name], reverse=True):
        is_older = (run / name).is_dir() and not is_of_this_run(run / name, run)
        fault = _agreed("it is of an earlier run in this folder" if is_older else None)
        fault = fault or agreed_fault(run / name)
        if fault is None:
            if faults and PartialState().is_main_process:
                logger.warning("Resuming from %s. Passed over: %s.", name, "; ".join(faults))
            return run / name
        faults.append(f"{name}, because {fault}")
    if not faults:
        raise ValueError(
            f"There is no checkpoint to resume from in {str(run)!r}. Give the `output_dir` of the run to go on "
            "with, or leave `resume_from_checkpoint` out to start anew."
        )
    raise ValueError(
        f"There is no complete checkpoint to resume from in {run}: {'; '.join(faults)}. Start a new run, or give "
        "another checkpoint by its folder."
    )


def _recover(run: Path) -> None:
    """Put back, once on each machine, what a killed run had moved aside."""
    state = PartialState()
    if state.is_local_main_process:
        put_back(run)
    state.wait_for_everyone()


def agreed_fault(checkpoint: Path) -> str | None:
    """Return the first fault that any rank sees. The ranks of a machine share the reading; each may have its disk."""
    readers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return _agreed(fault_of(checkpoint, (PartialState().local_process_index % readers, readers)))


def _agreed(found: str | None) -> str | None:
    return next((fault for fault in _over_ranks([found]) if fault is not None), None)


def _over_ranks(found: list[Any]) -> list[Any]:
    return gather_object(found) if PartialState().num_processes > 1 else found


# ---- What it trains ----


def require_trained(checkpoint: Path, model: Any, args: Any) -> None:
    """
    Raise `ValueError` if a checkpoint has no weights of the kind that a run trains, an adapter or the whole model, or
    an adapter of another shape.
    """
    adapters = getattr(model, "peft_config", None) if is_peft_model(model) else None
    if args.deepspeed_plugin is None and not args.fsdp:  # whose weights have other names
        names = (ADAPTER_WEIGHTS,) if adapters else WHOLE_WEIGHTS
        folders = [checkpoint, *(checkpoint / name for name in adapters or ())]
        if not any(list(folder.glob(name)) for folder in folders for name in names):
            this, other = ("an adapter", "the whole model") if adapters else ("the whole model", "an adapter")
            raise ValueError(
                f"This run trains {this}, and {checkpoint} has none of its files ({' or '.join(names)}): they are "
                f"gone, or it is of a run that trains {other}. Resume it with the options of the run that saved it "
                "(`use_peft`, in Python `peft_config`), or give another checkpoint."
            )
    path = checkpoint / "adapter_config.json"
    if adapters and "default" in adapters and path.is_file():
        saved, now = json.loads(path.read_text(encoding="utf-8")), adapters["default"].to_dict()
        differing = [name for name in OF_AN_ADAPTER if _unordered(saved.get(name)) != _unordered(now.get(name))]
        if differing:
            before, here = (", ".join(f"{name}={each.get(name)}" for name in differing) for each in (saved, now))
            raise ValueError(
                f"The adapter saved in {checkpoint} has {before}; that of this run has {here}. Resume with the same "
                "adapter."
            )


def _unordered(value: Any) -> Any:
    return set(value) if isinstance(value, list | tuple | set) else value


# ---- The optimizer ----


def absent_optimizer(checkpoint: Path, deepspeed_plugin: Any) -> list[str]:
    """Return the files with the state of optimizer and schedule that a checkpoint lacks."""
    if deepspeed_plugin is not None:  # DeepSpeed saves its engine
        return []
    by_fsdp = (checkpoint / "optimizer.bin").is_file() or list(checkpoint.glob("optimizer_*"))
    files = [SCHEDULER_NAME] if by_fsdp else [SCHEDULER_NAME, OPTIMIZER_NAME]
    return [name for name in files if not (checkpoint / name).is_file()]


def require_optimizer(checkpoint: str | Path | None, deepspeed_plugin: Any) -> None:
    """Raise `ValueError` for a checkpoint without the optimizer's state: the Trainer would go on with a new one."""
    absent = [] if checkpoint is None else absent_optimizer(Path(checkpoint), deepspeed_plugin)
    if absent:
        raise ValueError(
            f"The run saved in {checkpoint} cannot go on: there is no {' and no '.join(absent)}. It was cut off, or "
            "saved with `save_only_model`, or is the result of a run and no checkpoint. Resume from another one, or "
            "start a new run from its model."
        )
