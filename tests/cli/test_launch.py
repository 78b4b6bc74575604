"""How a command starts itself on several processes, and how it does not."""

import json
import signal
from argparse import Namespace

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import two_processes
from cli_runs import run_of
from trl_ext.cli import launch
from trl_ext.cli.launch import LaunchArguments, accelerate_flags, launches, require_all
from trl_ext.cli.main import main
from trl_ext.cli.options import read
from trl_ext.cli.parser import OptionParser
from trl_ext.cli.recipes import INSTALLED


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


def asked(*words):
    return read(OptionParser("", (LaunchArguments,)), list(words))


def test_flags_of_accelerate_are_those_that_were_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = INSTALLED / "accelerate"
    assert accelerate_flags(asked("--nproc", "3")) == [
        *("--config_file", str(configs / "ddp.yaml")),
        *("--num_processes", "3"),
    ]
    words = ("--accelerate_config", "zero3_2nodes", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    assert accelerate_flags(asked(*words)) == [
        *("--config_file", str(configs / "zero3_2nodes.yaml")),
        *("--deepspeed_config_file", str(INSTALLED / "deepspeed" / "zero3.json")),
        *("--machine_rank", "1", "--main_process_ip", "10.0.0.1"),
    ]


def test_a_file_of_one_process_is_not_for_several():
    with pytest.raises(ValueError, match="starts one process, and `--nproc 2` asks for more"):
        accelerate_flags(asked("--nproc", "2", "--accelerate_config", "single"))


def test_command_launches_once(monkeypatch):
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert not launches(asked())
    assert launches(asked("--nproc", "2"))
    assert launches(asked("--accelerate_config", "zero3"))
    with pytest.raises(ValueError, match="`--machine_rank` is for several machines or processes"):
        launches(asked("--machine_rank", "0"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not launches(asked("--nproc", "2"))


def test_processes_that_do_not_see_each_other_are_an_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"has started 2 processes, and this one sees 1.*add `--use_cpu`"):
        require_all(Namespace(world_size=1))
    require_all(Namespace(world_size=2))


def _failures(*codes):
    of = {rank: ProcessFailure(rank, rank, code, "no file") for rank, code in enumerate(codes)}
    return ChildFailedError("trl_ext.cli", of)


@pytest.mark.parametrize(
    "error, code",
    [
        (SignalException("", signal.SIGTERM), 143),  # the launcher has got the signal
        (SignalException("", signal.SIGINT), 130),
        (_failures(143, 143), 143),  # the processes have
        (_failures(143, 1), 1),
    ],
)
def test_launcher_exits_as_its_processes_do_or_says_which_failed_first(monkeypatch, error, code):
    def launch_command(_):
        raise error

    monkeypatch.setattr(launch, "launch_command", launch_command)
    given = asked("--nproc", "2")
    given.values.use_cpu = True
    with pytest.raises(SystemExit) as end:
        launch.launch("dpo", given)
    assert end.value.code == code if code > 1 else "Root Cause (first observed failure)" in end.value.code


@pytest.mark.proof
@pytest.mark.distributed
def test_nproc_starts_processes_that_train_one_model(paths, tmp_path, monkeypatch, capfd):
    for name, value in two_processes.environment().items():
        monkeypatch.setenv(name, value)
    short = {"max_steps": 1, "per_device_train_batch_size": 2, "output_dir": tmp_path / "out", "nproc": 2}
    main(["dpo", *run_of("dpo", paths, **short)])
    assert capfd.readouterr().out.count("Everything is in") == 1
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 1
    facts = json.loads((tmp_path / "out" / "run.json").read_text())
    assert facts["facts"]["hardware"] == "2 × CPU"
