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
from pathlib import Path
from typing import ClassVar

from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from ... import RewardTrainerX, save_base_fingerprint
from ...data.json_values import plain_file
from ...report import REWARD_LINE, use_brief_progress
from ...runs.folder import checkpoint_of
from ...runs.steps_left import require_steps_left
from ...statistics import wilson_interval
from ..closing import closing_lines, program, report_callbacks, running
from ..data import PairArguments, load_pairs, require_steps
from ..dry_run import dry_run
from ..launch import LaunchArguments, launch, launches, require_all
from ..models import ModelArguments, model_errors, path_of, require_adapted
from ..options import Options, read, usage_errors


DEMO = "reward/demo"
DEFAULTS = {"logging_first_step": True}


@dataclass
class RewardArguments(LaunchArguments, PairArguments):
    TOPIC: ClassVar[str] = "Options of a reward run"


def build(data: RewardArguments, model: ModelArguments, args: RewardConfig) -> RewardTrainer:
    path = path_of(model)
    args.model_init_kwargs = model.init_kwargs(args.use_cpu) | (args.model_init_kwargs or {})
    # The new head is trained in full.
    adapter, quantization = model.adapter("SEQ_CLS", ["score"]), model.quantization()
    splits = load_pairs(data)
    require_steps(splits["train"], args.max_steps)
    with model_errors(model):
        trainer = RewardTrainerX(
            path,
            args,
            train_dataset=splits["train"],
            eval_dataset=splits["test"],
            peft_config=adapter,
            quantization_config=quantization,
        )
    require_adapted(trainer.model, model)
    return trainer


def report(trainer: RewardTrainer, metrics: dict[str, float]) -> None:
    """Accuracy with its interval on the terminal and in metrics.json."""
    count, accuracy = int(metrics["eval_pairs"]), metrics["eval_accuracy"]
    low, high = wilson_interval(accuracy * count, count)
    print(f"Held-out pairs in the right order: {accuracy:.1%} of {count} (95% interval {low:.1%} to {high:.1%})")
    facts = metrics | {"eval_pairs": count, "eval_accuracy_low": low, "eval_accuracy_high": high}
    output = Path(trainer.args.output_dir)
    (output / "metrics.json").write_text(plain_file(facts), encoding="utf-8")


def options(argv: list[str] | None = None) -> Options:
    return read("reward", (RewardArguments, ModelArguments, RewardConfig), __doc__, argv, DEMO, DEFAULTS)


def main(argv: list[str] | None = None) -> None:
    with usage_errors():
        given = options(argv)
        if given.dry_run:
            return dry_run("reward", given, load_pairs)
        if launches(given):
            return launch("reward", given)
        data, model, args = given.make()
        require_all(args)
        checkpoint = checkpoint_of(args.resume_from_checkpoint, args.output_dir)
        require_steps_left(checkpoint, args.max_steps)
    set_seed(args.seed)
    with usage_errors():
        trainer = build(data, model, args)
    use_brief_progress(trainer, REWARD_LINE)
    for callback in report_callbacks(data.source):
        trainer.add_callback(callback)
    with running("reward", given, args):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        save_base_fingerprint([args.output_dir], trainer.model.config.name_or_path, model.model_revision)
        report(trainer, metrics)
    trainer.create_model_card(dataset_name=data.dataset_name)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        print(closing_lines("reward", args.output_dir, given.argv, next=for_ppo(data, model, args)))


def for_ppo(data: RewardArguments, model: ModelArguments, args: RewardConfig) -> str:
    """PPO of the same model, against what was trained, on the prompts of the same data."""
    options = {"model": model.model_name_or_path, "dataset_name": data.dataset_name}
    flags = [word for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    flags += ["--columns", *data.columns] if data.columns else []
    if model.use_peft:
        flags += ["--use_peft", "--critic", "adapter", *(["--load_in_4bit"] if model.load_in_4bit else [])]
    out = ["--output_dir", f"{args.output_dir}-ppo"] if data.dataset_name else []
    return f"{program('ppo')} {shlex.join([*flags, '--reward_model_path', args.output_dir, *out])}"
