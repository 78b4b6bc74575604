"""
Does it fit, how fast is it, and what would make it fit: a run planned from configs alone. Nothing is loaded.

    trl-ext plan --model 33b --gpus 4 --zero_stage 3 --offload_optimizer --offload_parameters
    trl-ext plan --from-config configs/ppo/documents.yaml --gpu rtx3090-24gb
    trl-ext plan --model 8b --gpu rtx4090-24gb --suggest
    trl-ext plan --trainer dpo --model 33b --gpus 2 --reference model
    trl-ext plan --model 7b --scale 1 8 64 1024 --episodes 100000

A model is a name of the built-in table (33b, llama-3.1-8b, …), a folder or a hub name. A recipe says the layout; flags
override it. Sizes of memory are GiB, lengths tokens.
"""

import argparse
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ... import DPOConfigX, PPOConfigX, planner
from ...planner import CPU, GIB, GPUS, Assumptions, Hardware, Layout, ModelNames
from ..data import DataArguments
from ..models import ModelArguments
from ..options import recipe_options, usage_errors
from ..recipes import find_config


CONFIGS = {"ppo": PPOConfigX, "dpo": DPOConfigX}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-ext plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--from-config", metavar="RECIPE", help="A recipe of configs/ppo or configs/dpo.")
    for name in ("model", "reward_model", "ref_model", "value_model"):
        parser.add_argument(
            f"--{name}", metavar="NAME", help="Its sizes; unset: the actor's, of the critic the reward's."
        )
    machine = parser.add_argument_group("hardware")
    machine.add_argument("--gpu", choices=[*GPUS, "cpu"], default="a100-80gb", help="Memory and speeds of one GPU.")
    for name in ("gpu_memory", "host_memory"):
        machine.add_argument(f"--{name}", type=float, metavar="GIB", help=f"{name.split('_')[0]} memory, overriding.")
    machine.add_argument("--gpus", type=int, default=1)
    machine.add_argument("--gpus_per_node", type=int, default=8)
    answers = parser.add_argument_group("answers")
    answers.add_argument("--suggest", action="store_true", help="Search the layouts that fit.")
    answers.add_argument("--scale", type=int, nargs="+", metavar="GPUS", help="The layout on these numbers of GPUs.")
    answers.add_argument("--episodes", type=float, default=1e5, help="Responses or pairs that GPU-hours are for.")
    answers.add_argument("--picture", type=Path, metavar="FILE.png", help="Draw how cost grows with size and length.")
    shares = parser.add_argument_group("assumed shares of the hardware's speeds")
    for field in fields(Assumptions):
        shares.add_argument(f"--assume_{field.name}", type=float, default=field.default)
    options = parser.add_argument_group("layout", "See `trl_ext.planner.Layout`.")
    for field in fields(Layout):
        default: Any = field.default if field.default is not MISSING else None
        if isinstance(default, bool):
            options.add_argument(f"--{field.name}", action=argparse.BooleanOptionalAction, default=None)
        else:
            kind = float if isinstance(default, float) else type(default)
            options.add_argument(f"--{field.name}", type=kind, default=None)
    return parser


def machine_of(given: argparse.Namespace) -> Hardware:
    sizes = {"memory": given.gpu_memory, "host_memory": given.host_memory}
    options: dict[str, Any] = {name: size * GIB for name, size in sizes.items() if size is not None}
    options |= {"gpus": given.gpus, "gpus_per_node": given.gpus_per_node}
    return Hardware(**(vars(CPU) | options)) if given.gpu == "cpu" else planner.hardware(given.gpu, **options)


def run_of(given: argparse.Namespace, machine: Hardware) -> tuple[ModelNames, Layout]:
    """The models and the layout: the recipe's, and over them the flags'."""
    flags = {f.name: getattr(given, f.name) for f in fields(Layout) if getattr(given, f.name) is not None}
    names = ModelNames(given.model or "smollm2-135m-instruct")
    if given.from_config:
        with usage_errors():
            recipe = find_config(given.from_config)
        trainer = flags.get("trainer") or recipe.resolve().parent.name
        if trainer not in CONFIGS:
            raise SystemExit(f"{given.from_config} is in no folder `ppo` or `dpo`: say which it is with --trainer.")
        config = CONFIGS[trainer]
        options = recipe_options((DataArguments, ModelArguments, config), recipe)
        names, layout = (
            planner.names_from_options(options),
            planner.layout_from_options(trainer, options, machine, given.prompt),
        )
    else:
        compute = "fp32" if machine.is_cpu else "bf16" if flags.get("zero_stage") or "method" in flags else "autocast"
        start: dict[str, Any] = {"compute": compute, "accumulation": 16}
        if flags.get("trainer") == "dpo":
            start |= {"critic": "none", "reward": "none", "trainer": "dpo"}
        layout = Layout(**start)
        steps = flags.get("micro_batch", 1) * flags.get("accumulation", layout.accumulation)
        flags.setdefault("rollout", steps)
    given_names = {"actor": given.model, "reward": given.reward_model, "reference": given.ref_model}
    given_names |= {"critic": given.value_model}
    return ModelNames(**(vars(names) | {role: name for role, name in given_names.items() if name})), layout.change(
        **flags
    )


def main(argv: list[str] | None = None) -> None:
    given = arguments().parse_args(argv)
    machine = machine_of(given)
    names, layout = run_of(given, machine)
    assumed = Assumptions(**{f.name: getattr(given, f"assume_{f.name}") for f in fields(Assumptions)})
    if given.suggest:
        table = planner.suggestion_table(planner.suggest(names, layout, machine, assumed))
        print(table, f"Assumed: {assumed}.", sep="\n\n")
        return
    planned = planner.plan(names, layout, machine)
    print(planner.plan_text(planned), planner.speed_text(planned, assumed, given.episodes), sep="\n\n")
    if given.scale:
        print("", planner.scale_table(planned, given.scale, assumed, given.episodes), sep="\n")
    if given.picture:
        planner.picture(planned, given.picture, assumed)
