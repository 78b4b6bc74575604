"""
Say whether a run fits, how fast it is, and what would make it fit, from configs alone. No model is loaded.

    trl-ext plan --model 33b --gpus 4 --zero_stage 3 --offload_optimizer --offload_parameters
    trl-ext plan --from-config configs/ppo/zhang2025.yaml --gpu 3090
    trl-ext plan --model 8b --gpu 4090 --suggest
    trl-ext plan --trainer dpo --model 33b --gpus 2 --reference model
    trl-ext plan --model 7b --scale 1 8 64 1024 --episodes 100000

A model is a size or a name (8b, qwen3-14b, google/gemma-3-4b-it, …), a folder or a hub name. A recipe gives the
layout, and flags override it. Memory is in GiB, lengths are in tokens.
"""

import argparse
import math
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ... import planner
from ...planner import CPU, GIB, Hardware, Layout, ModelNames
from ..errors import is_debugging, usage_errors
from ..flags import CommandParser
from ..recipes import find_config, find_deepspeed, read_recipe
from ..wording import Wording


FIRST = "The 10 options that matter first"
FIRST_OPTIONS = "from_config model trainer method gpu gpus zero_stage prompt response suggest".split()

START_MODEL, START_ACCUMULATION = "smollm2-135m-instruct", 16
# What holds without a recipe, where it is not the default of `Layout`.
START_TEXTS = {
    "accumulation": str(START_ACCUMULATION),
    "rollout": "micro_batch × accumulation",
    "compute": "fp32 on a CPU; else bf16 with --zero_stage or --method, and autocast without",
    "critic": "model; of pairs none",
    "reward": "model; of pairs none",
    "reference": "model; of reward runs none",
}
# With what a model's sizes are those of another.
MODEL_TEXTS = {
    "model": f"Model whose sizes the actor has. Unset: {START_MODEL}.",
    "reward_model": "Model whose sizes the reward model has. Unset: the actor's.",
    "ref_model": "Model whose sizes the reference has. Unset: the actor's.",
    "value_model": "Model whose sizes the critic has. Unset: the reward model's.",
}


def arguments() -> CommandParser:
    parser = CommandParser("plan", __doc__)
    parser.usage = "%(prog)s [options]"
    groups = {FIRST: parser.add_argument_group(FIRST)}

    def add(group: str, name: str, **options: Any) -> None:
        heading = FIRST if name in FIRST_OPTIONS else group
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        groups[heading].add_argument(f"--{name}", **options)

    recipe = "A recipe of PPO, DPO or a reward run: a path, or the name of an installed one."
    add("models", "from_config", metavar="RECIPE", help=recipe)
    for name, text in MODEL_TEXTS.items():
        add("models", name, metavar="NAME", help=text)
    card = 'One GPU\'s memory and speeds, by a loose name: 4090, a100-40, h100, "rtx 5090", or cpu.'
    add("hardware", "gpu", metavar="NAME", default="a100-80gb", help=card)
    for name, of in (("gpu_memory", "One GPU's"), ("host_memory", "One machine's")):
        add("hardware", name, type=float, metavar="GIB", help=f"{of} memory, instead of the table's.")
    add("hardware", "gpus", type=int, default=1, help="Number of GPUs, over all machines.")
    add("hardware", "gpus_per_node", type=int, default=8, help="Number of GPUs in one machine.")
    add("answers", "suggest", action="store_true", help="Search for layouts that fit.")
    add("answers", "scale", type=int, nargs="+", metavar="GPUS", help="Show the layout on these numbers of GPUs.")
    add("answers", "episodes", type=float, default=1e5, help="Number of responses or pairs to compute GPU-hours for.")
    add("answers", "picture", type=Path, metavar="FILE.png", help="Draw how cost grows with size and length.")
    for field in fields(Layout):
        default: Any = field.default if field.default is not MISSING else None
        text = f"{field.metadata['help']} (default: {START_TEXTS.get(field.name, default)})"
        said: dict[str, Any] = {"default": None, "help": text}
        if isinstance(default, bool):
            add("layout", field.name, action=argparse.BooleanOptionalAction, **said)
        else:
            kind = float if isinstance(default, float) else type(default)
            add("layout", field.name, type=kind, metavar=kind.__name__.upper(), **said)
    return parser


def machine_of(given: argparse.Namespace) -> Hardware:
    sizes = {"memory": given.gpu_memory, "host_memory": given.host_memory}
    for flag, size in {"gpu_memory": given.gpu_memory, "host_memory": given.host_memory}.items():
        if size is not None and size <= 0:
            raise ValueError(f"`--{flag}` is {size:g}; it must be above 0, in GiB, such as `--{flag} 24`.")
    options: dict[str, Any] = {name: size * GIB for name, size in sizes.items() if size is not None}
    options |= {"gpus": given.gpus, "gpus_per_node": given.gpus_per_node}
    return Hardware(**(vars(CPU) | options)) if given.gpu == "cpu" else planner.hardware(given.gpu, **options)


def run_of(given: argparse.Namespace, machine: Hardware) -> tuple[ModelNames, Layout]:
    """Return the models and the layout: the recipe's, overridden by the flags'."""
    flags = {f.name: getattr(given, f.name) for f in fields(Layout) if getattr(given, f.name) is not None}
    names = ModelNames(given.model or START_MODEL)
    if given.from_config:
        recipe = find_config(given.from_config, option="--from_config")
        trainer = flags.get("trainer") or recipe.resolve().parent.name
        if trainer not in ("ppo", "dpo", "reward"):
            raise ValueError(
                f"The recipe {given.from_config!r} is in no folder of the name ppo, dpo or reward: say whose it is, "
                "such as `--trainer ppo`."
            )
        options = options_of(recipe)
        names = planner.names_from_options(options)
        layout = planner.layout_from_options(trainer, options, machine, given.prompt)
    else:
        compute = "fp32" if machine.is_cpu else "bf16" if flags.get("zero_stage") or "method" in flags else "autocast"
        start: dict[str, Any] = {"compute": compute, "accumulation": START_ACCUMULATION}
        if (trainer := flags.get("trainer", "ppo")) != "ppo":
            start |= {"critic": "none", "reward": "none", "trainer": trainer}
            start |= {"reference": "none"} if trainer == "reward" else {}
        layout = Layout(**start)
        flags.setdefault("rollout", flags.get("micro_batch", 1) * flags.get("accumulation", layout.accumulation))
    roles = {"actor": "model", "reward": "reward_model", "reference": "ref_model", "critic": "value_model"}
    named = {role: name for role, option in roles.items() if (name := getattr(given, option))}
    return ModelNames(**(vars(names) | named)), layout.change(**flags)


def options_of(recipe: Path) -> dict[str, Any]:
    """Return the options of a recipe by their first names; those that it leaves out have the planner's defaults."""
    options = {key.replace("-", "_"): value for key, value in read_recipe(recipe).items()}
    if "model" in options:
        options["model_name_or_path"] = options.pop("model")
    return options | {"deepspeed": find_deepspeed(options.get("deepspeed"))}


def answer(given: argparse.Namespace) -> None:
    """Print the plan, or the suggestions; draw the picture."""
    if given.picture and given.picture.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(
            f"`--picture` is {given.picture}; give a name that ends in .png, .svg or .pdf, such as `--picture "
            f"{shlex.quote(str(given.picture.with_suffix('.png')))}`."
        )
    if not 0 < given.episodes < math.inf:
        raise ValueError(f"`--episodes` is {given.episodes:g}; it must be above 0, a number of responses or pairs.")
    machine = machine_of(given)
    names, layout = run_of(given, machine)
    if given.suggest:
        table = planner.suggestion_table(planner.suggest(names, layout, machine))
        print(table, planner.assumed(layout.trainer), sep="\n\n")
        return
    planned = planner.plan(names, layout, machine)
    print(planner.plan_text(planned), planner.speed_text(planned, given.episodes), sep="\n\n")
    if given.scale:
        print("", planner.scale_table(planned, given.scale, given.episodes), sep="\n")
    if given.picture:
        planner.picture(planned, given.picture)


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    given = parser.parse_args(argv)
    try:
        with usage_errors(Wording(parser)):
            answer(given)
    except Exception as error:  # a config may be anybody's, and reading it may raise anything
        if is_debugging():
            raise
        text = " ".join(str(error).split())
        raise SystemExit(f"error: {type(error).__name__}: {text}") from error
