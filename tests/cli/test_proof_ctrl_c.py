"""
Ctrl-C and SIGTERM in the middle of `trl-ext reward`, `dpo` and `ppo`, on the model of the demo: the line that the run
then prints, given to a shell as it is, goes on to what the run that was not stopped has left.

    .venv/bin/pytest -m measure -s tests/cli/test_proof_ctrl_c.py
"""

import os
import pty
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
from safetensors.torch import load_file

import two_processes


pytestmark = pytest.mark.measure

SHORT = "--per_device_train_batch_size 2 --per_device_eval_batch_size 4 --test_size 4"
LINES = {
    "reward": f"trl-ext reward {SHORT} --max_steps 5 --train_size 16",
    "dpo": f"trl-ext dpo {SHORT} --max_steps 5 --train_size 16",
    # Two rollouts, with four steps from each.
    "ppo": f"trl-ext ppo {SHORT} --total_episodes 8 --gradient_accumulation_steps 2 --num_mini_batches 2 "
    "--num_ppo_epochs 2 --reward_model_path 'of reward' --reward_funcs moments.py:words",
}
# A reward function, which says what PPO is doing, and takes long enough to be met.
MOMENTS = """
import time
from trl_ext import PPOTrainerX

generate = PPOTrainerX._generate_single_turn

def saying_so(*args, **kwargs):
    print("generating", flush=True)
    return generate(*args, **kwargs)

PPOTrainerX._generate_single_turn = saying_so

def words(completions, **kwargs):
    print("scoring", flush=True)
    time.sleep(1.0)
    return [len(completion.split()) / 10 for completion in completions]
"""
TO_GO_ON = re.compile(r"Stopped at step (\d+) by (\w+)\. To go on from there: (.*)")
# What a run has printed -> the step after which it stops. PPO drops the rollout in which it is met.
AMID = {
    "a step": (r"step 2/\d ", 3),
    "generation": (r"step 4/\d .*generating", 4),
    "scoring": (r"step 4/\d .*scoring", 4),
}
CASES = [
    *((name, "a step", number) for name in LINES for number in (signal.SIGINT, signal.SIGTERM)),
    ("ppo", "generation", signal.SIGINT),
    ("ppo", "scoring", signal.SIGINT),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Gives the folder in which all commands run, once the run of that name that is not stopped is there."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "moments.py").write_text(MOMENTS)

    def make(name):
        if name == "ppo":
            make("reward")  # its reward model
        if not (folder / f"of {name}").is_dir():
            run_by_a_shell(f"{LINES[name]} --output_dir 'of {name}'", folder)
        return folder

    return make


def run_by_a_shell(line, folder):
    result = subprocess.run(
        line, shell=True, cwd=folder, env=two_processes.environment(), capture_output=True, text=True
    )
    assert result.returncode == 0, f"{line}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def stopped(line, folder, amid, number):
    """
    Runs a command in a terminal of its own, and stops it by the keys of Ctrl-C, or a signal; returns its exit code,
    what it has printed until then, what after, and how many seconds it took to end.
    """
    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        os.execvpe("sh", ["sh", "-c", f"exec {line}"], two_processes.environment())
    until, after, at = b"", b"", None
    with suppress(OSError):  # the end of a terminal
        while part := os.read(terminal, 2**16):
            if at is not None:
                after += part
                continue
            until += part
            if re.search(amid.encode(), until, re.DOTALL):
                time.sleep(0.3)
                at = time.monotonic()
                if number == signal.SIGINT:
                    os.write(terminal, b"\x03")
                else:
                    os.kill(process, number)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(terminal)
    assert at is not None, until.decode()[-4000:]
    return code, after.decode(errors="replace"), time.monotonic() - at


def weights_in(folder):
    return {
        (file, name): weight
        for file in ("model.safetensors", "adapter_model.safetensors", "critic/model.safetensors")
        if (folder / file).is_file()
        for name, weight in load_file(folder / file).items()
    }


@pytest.mark.parametrize("name, amid, number", CASES, ids=lambda value: getattr(value, "name", value))
def test_stopped_command_goes_on_by_the_line_that_it_prints(whole, name, amid, number):
    folder, (pattern, step) = whole(name), AMID[amid]
    output = folder / f"{name}, stopped amid {amid} by {number.name}"
    code, after, seconds = stopped(f"{LINES[name]} --output_dir '{output.name}'", folder, pattern, number)
    assert code == 128 + number, after[-4000:]
    if amid == "generation":
        assert "scoring" not in after
    at, by, line = TO_GO_ON.search(after.replace("\r", "")).groups()
    assert (int(at), by) == (step, number.name)
    assert line.startswith(f"trl-ext {name} ")
    run_by_a_shell(line, folder)
    found, expected = weights_in(output), weights_in(folder / f"of {name}")
    assert found.keys() == expected.keys() != set()
    largest = max((weight - expected[key]).abs().max().item() for key, weight in found.items())
    print(f"\n{name}, {number.name} amid {amid}: exit code {code} after {seconds:.1f} s; {largest:.1e} from the whole")
    assert largest == 0.0
    shutil.rmtree(output)  # 2 GB
