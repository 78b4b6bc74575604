"""Start several processes: a command starts itself again through `accelerate launch`."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..runs.signals import CAUGHT
from .errors import is_debugging
from .options import Options
from .recipes import find_config, read_yaml


@dataclass
class LaunchArguments:
    TOPIC: ClassVar[str] = "Launching, checks before it, and a profile"

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the batch plan, the memory plan and the first sample as the model reads it, and stop. "
            "Only the tokenizer is loaded."
        },
    )
    json: bool = field(default=False, metadata={"help": "With --dry_run: print it all as one JSON object."})
    gpu: str | None = field(
        default=None,
        metadata={"help": "With --dry_run: the GPU to plan for, such as 4090 or a100-40. Unset: this machine's."},
    )
    force: bool = field(
        default=False, metadata={"help": "Train even if the planner says that the run does not fit the GPU's memory."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Write over the run that `--output_dir` holds; its checkpoints of other steps stay."},
    )
    profile: bool = field(
        default=False,
        metadata={"help": "Show where the time of the second update goes: a table, and a trace of torch's profiler."},
    )
    nproc: int | None = field(
        default=None, metadata={"help": "Number of processes to start, over all machines: one for each GPU."}
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={
            "help": "A file for `accelerate launch`, or an installed one: ddp (the default with --nproc), zero3, …"
        },
    )
    machine_rank: int | None = field(
        default=None, metadata={"help": "With several machines: the number of this one, from 0."}
    )
    main_process_ip: str | None = field(
        default=None, metadata={"help": "With several machines: address of machine 0."}
    )
    main_process_port: int | None = field(default=None, metadata={"help": "Port of the first process."})


STOPPED = {128 + number for number in CAUGHT}  # exit codes of a run that a signal has stopped
# Options that are accelerate's own too.
OF_ACCELERATE = ("machine_rank", "main_process_ip", "main_process_port")


def launches(given: Options) -> bool:
    """Return whether the command is to start processes, and has not been started by a launcher."""
    asked = given.nproc is not None or given.accelerate_config is not None
    require_count(given)
    if not asked and any(getattr(given, name) is not None for name in OF_ACCELERATE):
        named = next(name for name in OF_ACCELERATE if getattr(given, name) is not None)
        raise ValueError(
            f"`--{named}` is for several machines or processes, and this run has one. Leave it out, or start several: "
            "`--nproc 2` on this machine, on several `--accelerate_config`, such as zero3_4nodes, or a file of your "
            "own."
        )
    is_launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ  # by torchrun, accelerate
    return asked and not is_launched


def require_count(given: Options) -> None:
    if given.nproc is not None and given.nproc < 1:
        raise ValueError(f"`--nproc` is {given.nproc}; it must be at least 1, a number of GPUs, such as `--nproc 2`.")


def launch(command: str, given: Options) -> None:
    """Run the command in several processes, as `accelerate launch` does, until all have ended."""
    # Without the flag, each process on a CPU would believe that it is the only one.
    on_cpu = [] if torch.cuda.is_available() or given.use_cpu else ["--use_cpu"]
    words = [*accelerate_flags(given), "--module", "trl_ext.cli", command, *given.argv, *on_cpu]
    try:
        launch_command(launch_command_parser().parse_args(words))
    except SignalException as stop:  # which the processes have got, too; they have ended
        raise SystemExit(128 + stop.sigval) from None
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        if codes <= STOPPED:  # by a signal to the processes alone
            raise SystemExit(max(codes)) from None
        if is_debugging():
            raise
        raise SystemExit(str(error)) from error  # the processes have said why; this says which failed first


def require_all(args: Any) -> None:
    """Raise `ValueError` if one process of several believes that it is alone, as on a CPU without `--use_cpu`."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != args.world_size:
        raise ValueError(
            f"The launcher has started {started} processes, and this one sees {args.world_size}: every one would "
            "train a model of its own into the same folder. On a machine without GPUs, add `--use_cpu`."
        )


def accelerate_flags(given: Options) -> list[str]:
    """Return the flags of `accelerate launch` for the command's options."""
    file, settings = accelerate_file(given)
    if (given.nproc or 1) > 1 and settings.get("distributed_type", "NO") == "NO":
        raise ValueError(
            f"{file} starts one process, and `--nproc {given.nproc}` asks for more. Leave out `--accelerate_config`, "
            "or choose a file whose `distributed_type` is another, such as ddp or zero3."
        )
    flags = {"config_file": file, "num_processes": given.nproc}
    deepspeed = deepspeed_of(settings)
    if deepspeed is not None and not Path(deepspeed).is_file():
        flags["deepspeed_config_file"] = find_config(deepspeed, "deepspeed")
    flags |= {name: getattr(given, name) for name in OF_ACCELERATE}
    return [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]


def accelerate_file(given: Options) -> tuple[Path, dict[str, Any]]:
    """Return the file that the processes are started with, and its content."""
    usual = "ddp" if (given.nproc or 1) > 1 else "single"
    file = find_config(given.accelerate_config or usual, "accelerate", "--accelerate_config")
    return file, read_yaml(file, "accelerate file")


def deepspeed_of(settings: dict[str, Any]) -> str | None:
    """Return the DeepSpeed file that an accelerate file names."""
    return (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")


def processes(given: Options) -> int:
    """Return how many processes the run has, or would have."""
    if given.nproc is not None:
        return given.nproc
    if given.accelerate_config is not None:
        return int(accelerate_file(given)[1].get("num_processes", 1))
    return int(os.environ.get("WORLD_SIZE", 1))


def is_sharded_by_fsdp(given: Options) -> bool:
    """Return whether the run's accelerate file has FSDP shard it."""
    return given.accelerate_config is not None and accelerate_file(given)[1].get("distributed_type") == "FSDP"


def deepspeed_file(given: Options) -> str | None:
    """Return the DeepSpeed file of the run, its own or that of its accelerate file."""
    named = deepspeed_of(accelerate_file(given)[1]) if given.accelerate_config is not None else None
    return given.deepspeed or (None if named is None else str(find_config(named, "deepspeed")))
