"""What stands against a run before a model is loaded: numbers that are no counts, missing packages, closed folders."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "lora_r")
# Logger of `report_to` -> packages of which one is enough.
LOGGERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
# In the names of optimizers that are bitsandbytes'; PyTorch's own of 4 and 8 bits are torchao's.
OF_BITSANDBYTES = ("8bit", "bnb", "paged")
OF_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


def check_startable(options: Any) -> None:
    """
    Args:
        options: of a run, as attributes; one that is missing is passed over.

    Raises:
        ValueError: for a batch of less than one row, an adapter of rank 0, a negative learning rate or number of
            epochs, or a package that an option needs and that is not installed.
    """
    _check_numbers(options)
    for asked, packages, install in _needed(options):
        if not any(is_installed(package) for package in packages):
            raise ValueError(f"{asked} needs {' or '.join(packages)}: `pip install {install}`, or leave it out.")


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; it is not imported."""
    return package in sys.modules or importlib.util.find_spec(package) is not None


def _check_numbers(options: Any) -> None:
    for name in COUNTS:
        value = getattr(options, name, None)
        if value is not None and (value != int(value) or value < 1):
            raise ValueError(f"`{name}` is {value}; it must be an integer of at least 1.")
    for name in ("learning_rate", "num_train_epochs", "warmup_steps", "weight_decay"):
        value = getattr(options, name, None)
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"`{name}` is {value}; it must be 0 or above.")


def _needed(options: Any) -> list[tuple[str, tuple[str, ...], str]]:
    """Return what was asked for, the packages of which it needs one, and what installs that."""
    needed = []
    for logger in _loggers(getattr(options, "report_to", None)):
        if logger not in LOGGERS:
            raise ValueError(f"`report_to` has {logger!r}; it may have {', '.join(LOGGERS)}, or be none or all.")
        needed.append((f"`report_to={logger}`", LOGGERS[logger], LOGGERS[logger][0]))
    optimizer = str(getattr(getattr(options, "optim", ""), "value", getattr(options, "optim", "")))
    if optimizer in OF_TORCHAO:
        needed.append((f"`optim={optimizer}`", ("torchao",), "torchao"))
    elif any(part in optimizer for part in OF_BITSANDBYTES):
        needed.append((f"`optim={optimizer}`", ("bitsandbytes",), "'trl-ext[qlora]'"))
    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(options, name, False):
            needed.append((f"`{name}`", ("bitsandbytes",), "'trl-ext[qlora]'"))
    if getattr(options, "deepspeed", None):
        needed.append(("`deepspeed`", ("deepspeed",), "'trl-ext[deepspeed]'"))
    if getattr(options, "use_liger_kernel", False):
        needed.append(("`use_liger_kernel`", ("liger_kernel",), "liger-kernel"))
    return needed


def _loggers(report_to: Any) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    return [] if names in (["all"], ["none"]) else names


def require_writable(path: str | Path, what: str = "output_dir") -> None:
    """
    Makes nothing: looks at the nearest folder on the way that is there.

    Args:
        path: a folder that files will be written into.
        what: the option that names it.

    Raises:
        ValueError: where it cannot be written.
    """
    folder = Path(path)
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"`{what}` is {folder}, and {there} is a file. Give a folder, or one that is yet to be made.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`{what}` is {folder}, and nothing can be written into {there}. Give another folder.")


def make_folder(path: str | Path, what: str = "output_dir") -> None:
    """
    Makes a folder, and sees that files can be written into it.

    Args:
        what: the option that names it.

    Raises:
        ValueError: where that cannot be.
    """
    require_writable(path, what)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"`{what}` is {path}, and nothing can be written there ({error.strerror}). Give another folder."
        ) from error
