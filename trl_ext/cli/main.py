"""`trl-ext`: one command with a subcommand for each thing to do."""

import difflib
import os
import shlex
import sys
from importlib import import_module
from itertools import pairwise

from .. import __version__
from ..noise import leave_out_noise
from .errors import is_debugging, take_debug
from .kept_help import FLAGS, print_help


COMMANDS = {
    "demo": "train a reward model, then PPO against it, on a small real model and real human ratings",
    "dpo": "teach a model what people prefer, from pairs of answers",
    "ppo": "reinforcement learning with actor, critic, reward model and reference",
    "serve": "start the vLLM server that a recipe of PPO samples with",
    "critic": "pretrain the critic of PPO on answers of the policy that PPO will start from",
    "reward": "train a reward model on pairs of answers",
    "plan": "does it fit, how fast is it, and what would make it fit",
    "merge": "make a whole model of an adapter and its base",
    "score": "score pairs of answers by what a DPO policy has learnt",
    "report": "a page and a picture about one run or several, also while they run",
    "chat": "talk to a model that was trained",
    "recipes": "list the recipes that come with the package, or write schemas for editors",
    "completion": "print a script that completes commands, options and values in the shell",
}

# What other programs call a command, or what is no command here.
MEANT = {
    "merge": "convert export fuse",
    "chat": "generate infer inference predict talk",
    "score": "eval evaluate test",
    "plan": "estimate memory",
    "report": "log plot dashboard",
    "reward": "rm reward-model reward_model",
    "ppo` or `trl-ext dpo": "train rlhf rl run",
}
OTHERS = {
    "sft": "Supervised fine-tuning is TRL's: `trl sft`.",
    "grpo": "GRPO is TRL's: `trl grpo`; with a critic it is `trl-ext ppo`.",
}


def main(argv: list[str] | None = None) -> None:
    """Run a command of `argv`, the words behind `trl-ext`; an unknown one exits with status 2."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(f"trl-ext {__version__}")
    elif command in COMMANDS and len(rest) == 1 and rest[0] in FLAGS:
        leave_out_noise()
        print_help(command, rest[0], lambda words: import_module(f".commands.{command}", __package__).main(words))
    elif command in COMMANDS:
        leave_out_noise()
        rest = take_debug(rest)
        try:
            run = import_module(f".commands.{command}", __package__).main
            if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun names the process that failed first
                from torch.distributed.elastic.multiprocessing.errors import record

                run = record(run)
            run(rest)
        except SystemExit as stopped:  # after `--help`
            if stopped.code:
                raise
        except KeyboardInterrupt:
            if is_debugging():
                raise
            print("Stopped by SIGINT.", file=sys.stderr)
            raise SystemExit(130) from None
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        near = near or [name for name, others in MEANT.items() if command.lower() in others.split()]
        meant = f"The commands are {', '.join(COMMANDS)}; `trl-ext --help` says what each does."
        what = f" ({COMMANDS[near[0]]})" if near and near[0] in COMMANDS else ""
        meant = OTHERS.get(command.lower(), f"Did you mean `trl-ext {near[0]}`{what}?" if near else meant)
        said = f"there is no command {command!r}. {meant}"
        if command.startswith("-"):
            words = [command, *rest]
            recipe = next((after for before, after in pairwise(words) if before == "--config"), "").partition("/")[0]
            meant = f"`trl-ext {recipe if recipe in COMMANDS else 'dpo'} {shlex.join(words)}`"
            ending = "." if recipe in COMMANDS else ", or another command."
            said = f"the command is missing before {command}: write {meant}{ending}"
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """Return every command with what it does."""
    lines = "\n".join(f"  trl-ext {name:12}{text}" for name, text in COMMANDS.items())
    return (
        f"PPO with a critic, and DPO, on Hugging Face TRL.\n\n{lines}\n\n"
        "`trl-ext COMMAND --help` shows a command's options, those that matter first; `--debug` shows where an error\n"
        "was raised. In a checkout, `python scripts/COMMAND.py` is the same command."
    )
