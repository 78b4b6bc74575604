"""
Pretrain PPO's critic: the policy answers once, and the critic learns what its answers are worth (VC-PPO).

    trl-ext critic && trl-ext ppo --value_model outputs/critic-demo    # the embedded demo, after `trl-ext reward`
    trl-ext critic --config my-ppo.yaml --output_dir out/critic        # a recipe of PPO, whose critic it is
    trl-ext critic --config my-ppo.yaml --output_dir out/again --rollouts out/critic/rollouts

The options are those of `trl-ext ppo`, of which sampling, rewards and the critic are read. Training ends when the
explained variance on answers to held-out prompts stops rising. The output folder gets the critic of the best pass and
the tokenizer, for `--value_model` of `trl-ext ppo`, the scored answers in rollouts/, metrics.json, and report.html
with its picture.
"""

import shlex
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from ... import CriticConfigX, CriticTrainerX
from ...report.progress import CRITIC_LINE
from ..closing import program, without
from ..models import ModelArguments
from ..options import Options
from ..output import beside
from ..training import TrainingCommand
from .ppo import PPOArguments, load, rewards


# Options that say something else of a critic's pretraining than of PPO, or nothing.
OF_THE_PRETRAINING = (
    "output_dir",
    "overwrite",
    "total_episodes",
    "learning_rate",
    "max_passes",
    "patience",
    "rollouts",
)


def create(path: str, args: CriticConfigX, data: PPOArguments, splits: DatasetDict, **loading: Any) -> CriticTrainerX:
    datasets = {"train_dataset": splits["train"], "eval_dataset": splits["test"]}
    given = rewards(path, args, data, splits) | datasets
    return CriticTrainerX(args, model=path, value_model=data.value_model, **given, **loading)


def evaluate(trainer: CriticTrainerX) -> dict[str, Any]:
    """Return how much of the held-out returns the critic explained before the first pass, and after each."""
    lines = [line for line in trainer.state.log_history if "eval_value/explained_variance_mc" in line]
    return {"before": lines[0], "after": lines[trainer.best_pass], "best_pass": trainer.best_pass, "passes": lines[1:]}


def report(trainer: CriticTrainerX, columns: dict[str, Any], *_: Any) -> None:
    """Print a line for each pass, and what the best one has brought."""
    key, best = "eval_value/explained_variance_mc", columns["best_pass"]
    print("Held-out responses: pass, explained variance of their returns, value loss")
    for i, line in enumerate([columns["before"], *columns["passes"]]):
        print(f"  {i:3} {line[key]:+9.3f} {line['eval_loss']:9.4f}{'  <- kept' if i == best else ''}")
    if best == 0:
        print("No pass was better than the critic that it started from: raise or lower `--learning_rate`.")


def further(given: Options, data: PPOArguments, model: ModelArguments, args: CriticConfigX) -> dict[str, str]:
    """Return how to run PPO with this critic, and how to train another one on the same responses."""
    same = without(given.argv, *OF_THE_PRETRAINING, "value_model")
    kept = args.rollouts or str(Path(args.output_dir) / "rollouts")
    again = {"rollouts": kept, "output_dir": beside(args.output_dir, "again")}
    words = [word for name, value in again.items() for word in (f"--{name}", value)]
    start = shlex.join([*same, "--value_model", args.output_dir, "--output_dir", beside(args.output_dir, "ppo")])
    return {
        "next": f"{program('ppo')} {start}",
        "again": f"{program('critic')} {shlex.join([*without(given.argv, *again, 'overwrite'), *words])}",
    }


COMMAND = TrainingCommand(
    name="critic",
    description=__doc__,
    classes=(PPOArguments, ModelArguments, CriticConfigX),
    defaults={"logging_first_step": True},
    line=CRITIC_LINE,
    load=load,
    create=create,
    evaluate=evaluate,
    report=report,
    further=further,
)
main, arguments = COMMAND.run, COMMAND.arguments
