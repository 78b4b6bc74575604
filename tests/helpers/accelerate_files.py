"""What `accelerate launch` makes of a file in configs/accelerate: the processes it starts, and their environment."""

import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser

from two_processes import ROOT


ACCELERATE = ROOT / "configs" / "accelerate"


@dataclass
class Launch:
    """Processes on this machine, machines, what else torchrun was told, and what was set in the environment."""

    processes: int
    machines: int
    options: dict[str, object]
    environment: dict[str, str]


def launch(path: Path, *flags: str) -> Launch:
    """Runs `accelerate launch --config_file path flags`, of several processes, up to where torchrun takes over."""
    seen: list[Launch] = []

    def torchrun(args: object) -> None:
        options = vars(args)
        machines = int(str(options["nnodes"]).split(":")[0])
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
        seen.append(Launch(int(options["nproc_per_node"]), machines, options, changed))

    before = dict(os.environ)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *flags, "script.py"])
    with mock.patch("torch.distributed.run.run", torchrun), mock.patch.dict(os.environ):
        launch_command(arguments)
    (result,) = seen
    return result
