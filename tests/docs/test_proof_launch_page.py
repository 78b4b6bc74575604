"""The commands of docs/launch.md run as they stand, on tiny models and data; two machines are two launchers here."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import tiny
import two_processes
import zero_runs
from two_processes import ROOT


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "launch.md").read_text(), flags=re.DOTALL)
COMMANDS = [" ".join(block.replace("\\\n", " ").split()) for block in BLOCKS]
MACHINES = [command for command in COMMANDS if "--machine_rank" in command]
ALONE = [command for command in COMMANDS if command not in MACHINES]

SIZES = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "test_size": 2,
    "save_strategy": "no",
    "eval_strategy": "no",
}
PPO = SIZES | {"total_episodes": 16, "response_length": 4, "num_mini_batches": 1}
DPO = SIZES | {"max_steps": 2, "max_length": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    zero_runs.save(folder)
    texts = tiny.tiny_prompts(24)["prompt"]
    pairs = [{"prompt": text, "chosen": " good film", "rejected": " bad film"} for text in texts]
    for name, rows in {"ppo": [{"prompt": text} for text in texts], "dpo": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def start(command: str, folder: Path, output: Path, log: Path, *more: str) -> subprocess.Popen:
    """Starts a command of the page in the root of the checkout, on this machine and with what is in `folder`."""
    launcher, *words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    flags, script, options = words[:place], words[place], words[place + 1 :]
    for flag in ("--num_processes", "--nproc_per_node"):
        if flag in flags:
            flags[flags.index(flag) + 1] = "2"
    algorithm = Path(script).stem
    data = {"model": folder / "actor", "dataset_name": folder / f"{algorithm}.jsonl", "output_dir": output}
    data |= PPO | {"reward_model_path": folder / "reward_model"} if algorithm == "ppo" else DPO
    module = {"accelerate": "accelerate.commands.accelerate_cli", "torchrun": "torch.distributed.run"}[launcher]
    tiny_run = [part for name, value in data.items() for part in (f"--{name}", str(value))]
    everything = [*flags, *more, str(two_processes.ON_CPU), script, *options, *tiny_run]
    with log.open("w") as printed:
        return subprocess.Popen(
            [sys.executable, "-m", module, *everything],
            env=two_processes.environment(),
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def finish(*processes: subprocess.Popen, logs: list[Path]) -> list[str]:
    """What they have printed; none of them, nor what they have started, is left behind."""
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait(timeout=900) == 0, log.read_text()[-6000:]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return [log.read_text() for log in logs]


def check(output: Path, algorithm: str) -> None:
    """What the scripts leave behind, from both processes' runs."""
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["before"]["step"], metrics["after"]["step"] > 0) == (0, True)
    assert (output / "critic").is_dir() == (algorithm == "ppo")
    assert list(output.glob("*.safetensors"))


def test_page_has_the_commands_that_are_run_here():
    assert len(ALONE) == 5
    assert len(MACHINES) == 2
    assert {command.split()[0] for command in COMMANDS} == {"accelerate", "torchrun"}


@pytest.mark.parametrize("command", ALONE)
def test_command_trains(command, folder, tmp_path):
    port = () if "single" in command else ("--main_process_port" if "accelerate" in command else "--master_port",)
    more = (*port, free_port()) if port else ()
    log, output = tmp_path / "log", tmp_path / "output"
    (printed,) = finish(start(command, folder, output, log, *more), logs=[log])
    check(output, "ppo" if "ppo.py" in command else "dpo")
    if "ppo.py" in command:
        assert "(4 × 2 processes)" in printed


def test_two_machines_train_one_model(folder, tmp_path):
    port = free_port()
    here = [command.replace("10.0.0.1", "127.0.0.1") for command in MACHINES]
    more = ("--num_processes", "2", "--main_process_port", port)
    logs, output = [tmp_path / "first", tmp_path / "second"], tmp_path / "output"
    both = [start(command, folder, output, log, *more) for command, log in zip(here, logs, strict=True)]
    printed = finish(*both, logs=logs)
    check(output, "ppo")
    assert all("(4 × 2 processes)" in each for each in printed)
