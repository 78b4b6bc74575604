"""End a command with one sentence instead of a traceback, where this package raised the error or knows the cure."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager


PACKAGE = __name__.split(".")[0]
DEBUG = "TRL_EXT_DEBUG"  # set by `--debug`, also for the processes that a command starts


# What other packages say of options that a user has given -> what to do.
KNOWN = {
    "--tf32 requires": "`tf32` needs an NVIDIA GPU of the Ampere generation or a later one, and none is seen here. "
    "Leave `--tf32` out.",
    "8 bit and 4 bit precision at the same time": "`--load_in_4bit` and `--load_in_8bit` exclude each other. Leave "
    "one out.",
    "support bf16/gpu": "`bf16` needs a GPU that computes in bfloat16, or `--use_cpu` beside it. Leave `--bf16` out: "
    "it is on by itself where the GPU can.",
    "At most one of fp16 and bf16": "`--bf16` and `--fp16` exclude each other. Leave one out.",
    "Unknown `fsdp` option": "`fsdp` is none that transformers knows: write `--fsdp full_shard`, and what else is to "
    "be set into `--fsdp_config`.",
    "requires the save and eval strategy to match": "`load_best_model_at_end` needs an evaluation with every "
    "checkpoint: give both the same value, such as `--eval_strategy epoch --save_strategy epoch`.",
    "No module named 'mpi4py'": "`deepspeed` needs processes that a launcher has started: add `--nproc`, the number "
    "of GPUs, also for one.",
    "only works in distributed training": "`fsdp` needs several processes: add `--nproc`, the number of GPUs.",
    "`args.metric_for_best_model` must be provided": "`save_strategy=best` needs a metric: add "
    "`--metric_for_best_model eval_loss`, for PPO `--metric_for_best_model eval_reward/score`.",
}


@contextmanager
def usage_errors(wording: Callable[[str], str] = str) -> Iterator[None]:
    """
    Within the context, an error that this package raises ends the command with its text, without a traceback, and so
    does one of another package whose cure is `KNOWN`; `wording` says it as the command's user does, who types options.
    """
    try:
        yield
    except (ValueError, ImportError, FloatingPointError) as error:  # an extra that is not installed is one, too
        cure = known_cure(error)
        if package_of(error) == PACKAGE:
            cure = str(error)
        if cure is None or is_debugging():
            raise
        raise SystemExit(f"error: {wording(cure)}") from error


def known_cure(error: BaseException) -> str | None:
    """Return what to do about an error of another package; `None` where that is not known."""
    return next((cure for said, cure in KNOWN.items() if said in str(error)), None)


def take_debug(words: list[str]) -> list[str]:
    """Return the words without `--debug`, which sets `DEBUG`; with a value it is an option of transformers."""
    following = [*words[1:], "-"]
    left = [words[i] for i in range(len(words)) if words[i] != "--debug" or not following[i].startswith("-")]
    if len(left) < len(words):
        os.environ[DEBUG] = "1"
    return left


def is_debugging() -> bool:
    """Return whether errors are shown with their traceback."""
    return bool(os.environ.get(DEBUG))


def package_of(error: BaseException) -> str:
    """Return the name of the package that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "").split(".")[0]
