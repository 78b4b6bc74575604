"""Command lines of tiny runs and of a toy, and what the command line says of them."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
from trl import RewardConfig

from commands import ROOT
from trl_ext.cli.data import DataArguments
from trl_ext.cli.main import main
from trl_ext.cli.models import ModelArguments
from trl_ext.cli.options import read
from trl_ext.cli.parser import OptionParser


RECIPES = [path for name in ("reward", "ppo", "dpo") for path in sorted((ROOT / "configs" / name).glob("*.yaml"))]
TRAINING = ("reward", "ppo", "dpo")


def flags(**options):
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def run_of(name, paths, **options):
    """Flags of a tiny run."""
    data = {"model": paths["actor"], "dataset_name": paths["prompts" if name == "ppo" else "pairs"]}
    judge = {"reward_model_path": paths["reward_model"], "response_length": 4} if name == "ppo" else {}
    return flags(**data | judge | {"report_to": "none"} | options)


def error_of(arguments, capsys):
    """What the command line says as it refuses."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code not in (0, None)
    return said


def plan_line(text):
    return next(line for line in text.splitlines() if " plan: " in line)


@dataclass
class Toy:
    TOPIC: ClassVar[str] = "A toy's"

    size: int = field(default=1, metadata={"help": "A size."})
    rate: float = field(default=0.5, metadata={"help": "A rate, 50% at first."})
    names: list[str] = field(default_factory=list, metadata={"help": "Names."})


def toy_run(argv, demo, defaults=None):
    """A toy's arguments, those of data and model, and TRL's of a reward run."""
    parser = OptionParser("", (Toy, DataArguments, ModelArguments, RewardConfig), description="A toy.")
    parser.set_defaults_with_config(**(defaults or {}))
    return read(parser, argv, demo).make()
