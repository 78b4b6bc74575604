"""
Train a reward model on preference pairs: Bradley-Terry, with TRL's RewardTrainer.

    trl-ext reward                                        # the embedded demo
    trl-ext reward --config my.yaml --learning_rate 2e-5  # any option of the recipe as a flag
    trl-ext reward --model Qwen/Qwen3-0.6B --dataset_name pairs.jsonl --output_dir out
    trl-ext reward --model Qwen/Qwen3-8B --use_peft --load_in_4bit --dataset_name pairs.jsonl

The pairs have the columns `chosen` and `rejected`, text or conversation, with or without `prompt`. The output folder
gets the model and its tokenizer (for `AutoModelForSequenceClassification`), metrics.json with the accuracy on held-out
pairs, and report.html with its picture. With --use_peft it gets the adapter with its score head, for `trl-ext ppo
--use_peft` on the same base, and base_model.json, a fingerprint of that base.
"""

import shlex
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import DatasetDict
from transformers import set_seed

from ... import RewardConfigX, RewardTrainerX, save_base_fingerprint
from ...report.progress import REWARD_LINE
from ...statistics import wilson_interval
from ..closing import program
from ..data import PairArguments, flags_of, load_pairs, require_steps
from ..launch import LaunchArguments
from ..models import ModelArguments
from ..options import Options
from ..output import beside
from ..training import TrainingCommand


@dataclass
class RewardArguments(LaunchArguments, PairArguments):
    TOPIC: ClassVar[str] = "Options of a reward run"


def create(
    path: str, args: RewardConfigX, data: RewardArguments, splits: DatasetDict, **loading: Any
) -> RewardTrainerX:
    require_steps(splits["train"], args.max_steps)
    set_seed(args.seed)  # the new score head is random
    return RewardTrainerX(path, args, train_dataset=splits["train"], eval_dataset=splits["test"], **loading)


def evaluate(trainer: RewardTrainerX) -> dict[str, Any]:
    """Return the held-out metrics, with the 95% interval of the accuracy."""
    metrics = trainer.evaluate()
    count = int(metrics["eval_pairs"])
    low, high = wilson_interval(metrics["eval_accuracy"] * count, count)
    return metrics | {"eval_pairs": count, "eval_accuracy_low": low, "eval_accuracy_high": high}


def report(trainer: RewardTrainerX, metrics: dict[str, Any], data: RewardArguments, model: ModelArguments) -> None:
    """Print the accuracy with its interval; write the fingerprint of an adapter's base."""
    save_base_fingerprint([trainer.args.output_dir], trainer.model.config.name_or_path, model.model_revision)
    accuracy, low, high = (metrics[f"eval_accuracy{end}"] for end in ("", "_low", "_high"))
    count = metrics["eval_pairs"]
    print(f"Held-out pairs in the right order: {accuracy:.1%} of {count} (95% interval {low:.1%} to {high:.1%})")


def further(given: Options, data: RewardArguments, model: ModelArguments, args: RewardConfigX) -> dict[str, str]:
    """Return how to run PPO on the same model against what was trained, on the prompts of the same data."""
    flags = ["--model", model.model_name_or_path] if model.model_name_or_path else []
    flags += flags_of(data)
    if model.use_peft:
        flags += ["--use_peft", "--critic", "adapter", *model.bits()]
    out = ["--output_dir", beside(args.output_dir, "ppo")] if data.dataset_name else []
    return {"next": f"{program('ppo')} {shlex.join([*flags, '--reward_model_path', args.output_dir, *out])}"}


COMMAND = TrainingCommand(
    name="reward",
    description=__doc__,
    classes=(RewardArguments, ModelArguments, RewardConfigX),
    defaults={"logging_first_step": True, "save_on_signal": True},
    line=REWARD_LINE,
    load=load_pairs,
    create=create,
    evaluate=evaluate,
    report=report,
    further=further,
    adapter=("SEQ_CLS", ["score"]),  # the new head is trained in full
)
main, arguments = COMMAND.run, COMMAND.arguments
