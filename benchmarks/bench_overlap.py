"""
What sampling ahead (`rollout_lag`) does to the seconds and to the learning of a run, with a real vLLM server and the
trainer as two processes of this machine, one core each.

    make test-vllm                                                 # makes the environment, .venv-vllm, and tests it
    PATH=$PWD/.venv-vllm/bin:$PATH
    python benchmarks/bench_overlap.py times                       # three minutes
    python benchmarks/bench_overlap.py learning                    # four minutes
    python benchmarks/bench_overlap.py learning --task "late score" --learning_rate 1e-3

`times`: the median seconds of a rollout with its learning, without and with overlap, for two tasks of
`bench_learning.py`, beside what the phases measured without overlap foretell: G + S + L, and the longer of G and
S + L; the weights that are sent count with G. `learning`: the held-out score over samples with lags of 0, 1 and 2, as
in docs/critic.md, from a start with heads of 32, the smallest that vLLM has on a CPU; `nats` is the largest mean
difference of a rollout between the log-probability of a token in the policy that learns and in the one that sampled.

docs/measurements.md says what was measured.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import bench_learning_setup as setup
from bench_learning import PPO, area, interval, signed
from transformers import PrinterCallback, TrainerCallback


ROOT = Path(__file__).resolve().parents[1]
HELPERS = ROOT / "tests" / "helpers"
PORT = 8741
GROUP_PORTS = count(29741)  # a process cannot listen twice at one port
SIZES = {"batch": 64, "measurements": 10}
SAMPLES = {"times": 64 * 24, "learning": 2560}
LAGS = (0, 1, 2)
setup.MODEL["num_attention_heads"] = 2

Run = dict[str, Any]


class Clock(TrainerCallback):
    """Takes the time whenever a rollout has been learned from."""

    def __init__(self, steps: int):
        self.steps, self.ends = steps, list[float]()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self.ends.append(time.perf_counter())


@contextmanager
def serving(start: Path, length: int) -> Iterator[str]:
    """The address of a server of the model in a folder, on the second core."""
    import vllm_rows

    url = f"http://127.0.0.1:{PORT}"
    if answers(url):
        raise RuntimeError(f"A server answers at {url} already, perhaps of a run that was killed: stop it first.")
    module = "vllm.entrypoints.openai.api_server"  # as `trl-ext serve` starts it
    command = [
        sys.executable,
        "-m",
        module,
        "--model",
        str(start),
        "--host",
        "127.0.0.1",
        "--port",
        str(PORT),
        "--dtype",
        "float32",
    ]
    command += ["--logprobs-mode", "processed_logprobs", "--max-model-len", str(length), *vllm_rows.SERVER_FLAGS]
    search = os.pathsep.join([str(ROOT), str(HELPERS)])
    settings = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": search, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as log:
        environment = os.environ | settings | vllm_rows.ENVIRONMENT
        process = subprocess.Popen(["taskset", "-c", "1", *command], env=environment, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 240
            while not answers(url):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(f"The server has not started.\n{log.read()[-4000:]}")
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            process.wait(30)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=2).status == 200
    except OSError:
        return False


def start_of(task: str, cache: Path) -> Path:
    """Return the folder of the model that a task starts from, made if it is not there, with its tokenizer."""
    start = setup.start_of(task, cache)
    setup.make_start(task, start)
    setup.tokenizer().save_pretrained(start)
    return start


def train(task: str, start: Path, url: str, seed: int, lag: int, rate: float = 3e-4, **sizes: int) -> Run:
    """Train one run in this process; return its curve, the seconds of each rollout and the log."""
    import bench_learning_worker as worker

    of_server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": url, "rollout_lag": lag}
    told = PPO | of_server | {"logging_steps": 1, "vllm_group_port": next(GROUP_PORTS)}
    job = SIZES | sizes | {"task": task, "kind": "ppo", "trainer": "plain", "seed": seed, "learning_rate": rate}
    job |= {"start": start.name, "options": told}
    with tempfile.TemporaryDirectory() as folder:
        trainer, curve = worker.build(job, start.parent, folder)
        clock = Clock(trainer.args.optimizer_steps_per_rollout)
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        begun = time.perf_counter()
        trainer.train()
    return {
        "task": task,
        "seed": seed,
        "lag": lag,
        "curve": curve.points,
        "rollouts": [b - a for a, b in zip([begun, *clock.ends], clock.ends, strict=False)],
        "log": [{k: v for k, v in line.items() if isinstance(v, int | float)} for line in trainer.state.log_history],
    }


def median(run: Run, key: str) -> float:
    """Return the median of a key, without the first rollouts."""
    return statistics.median([line[key] for line in run["log"] if key in line][3:])


def times(cache: Path, samples: int) -> list[str]:
    """Measure a rollout with each lag, and print it beside what its phases foretell."""
    lines = ["| task | G | S + L | G + S + L | lag 0 | max(G, S + L) | lag 1 | server idle, of lag 1 | waits for it |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for task in ("sorting", "late score"):
        start = start_of(task, cache)
        sizes = {"samples": samples, "measurements": 1}
        with serving(start, 64) as url:
            runs = [train(task, start, url, seed, lag, **sizes) for seed in (1, 2) for lag in (0, 1)]
        of_lag = {lag: [run for run in runs if run["lag"] == lag] for lag in (0, 1)}

        def mean(lag: int, key: str, of_lag: dict[int, list[Run]] = of_lag) -> float:
            return statistics.mean(median(run, key) for run in of_lag[lag])

        g = mean(0, "time/generate")
        rest = mean(0, "time/score") + mean(0, "time/learn")
        took = {
            lag: statistics.mean(statistics.median(run["rollouts"][3:-1]) for run in of_lag[lag]) for lag in (0, 1)
        }
        cells = [g, rest, g + rest, took[0], max(g, rest), took[1], mean(1, "time/server_idle")]
        cells.append(mean(1, "time/server_wait"))
        lines.append(f"| {task} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        spread = {lag: [round(statistics.median(run["rollouts"][3:-1]), 3) for run in of_lag[lag]] for lag in (0, 1)}
        print(task, "seconds of each run:", spread, flush=True)
    return lines


def learning(cache: Path, task: str, samples: int, seeds: list[int], rate: float, file: Path) -> list[str]:
    """Train a task with each lag, and print the area under the held-out score and its end; finished runs are kept."""
    start, wanted = start_of(task, cache), [(task, rate, seed, lag) for seed in seeds for lag in LAGS]
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {(run["task"], run["rate"], run["seed"], run["lag"]): run for run in runs}
    with serving(start, 64) as url:
        for name in wanted:
            if name in found:
                continue
            run = train(task, start, url, *name[2:], rate=rate, samples=samples)
            apart = "sampling/sampling_logp_difference/mean"
            difference = max(line[apart] for line in run["log"] if apart in line)
            found[name] = dict(zip(("task", "rate", "seed", "lag"), name, strict=True))
            found[name] |= {"curve": run["curve"], "difference": difference}
            with file.open("a") as lines:
                lines.write(json.dumps(found[name]) + "\n")
            print(f"{name}: area {area(run):.3f}, {sum(run['rollouts']):.0f} s", flush=True)
    table = [
        f"{task}, learning rate {rate:g}, {len(seeds)} seeds:",
        "| lag | area, mean ± half its 95% interval | area less that of lag 0, by seed | last score | nats |",
        "|---|---|---|---|---|",
    ]
    areas = {lag: [area(found[task, rate, seed, lag]) for seed in seeds] for lag in LAGS}
    for lag in LAGS:
        of_lag = [found[task, rate, seed, lag] for seed in seeds]
        less = [a - b for a, b in zip(areas[lag], areas[0], strict=True)]
        last, most = statistics.mean(run["curve"][-1][1] for run in of_lag), max(run["difference"] for run in of_lag)
        mean, half = interval(areas[lag])
        difference = signed(*interval(less)) if lag else ""
        table.append(f"| {lag} | {mean:.3f} ± {half:.3f} | {difference} | {last:.3f} | {most:.2g} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["times", "learning"])
    parser.add_argument("--task", choices=["sorting", "late score"], default="sorting", help="of `learning`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="of `learning`")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="of `learning`")
    parser.add_argument("--samples", type=int, help="answers of a run, 64 a rollout; 1536 for `times`, 2560 else")
    parser.add_argument("--file", type=Path, default=ROOT / "build" / "bench_overlap.jsonl", help="of finished runs")
    parser.add_argument("--cache", type=Path, default=ROOT / "build", help="where starts are kept")
    given = parser.parse_args()
    sys.path.insert(0, str(HELPERS))
    import vllm_rows

    os.environ.update(vllm_rows.ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"})
    os.sched_setaffinity(0, {0})
    import torch

    import vllm_cpu

    torch.set_num_threads(1)
    vllm_cpu.send_by_gloo()
    given.file.parent.mkdir(parents=True, exist_ok=True)
    samples = given.samples or SAMPLES[given.what]
    if given.what == "times":
        lines = times(given.cache, samples)
    else:
        lines = learning(given.cache, given.task, samples, given.seeds, given.learning_rate, given.file)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
