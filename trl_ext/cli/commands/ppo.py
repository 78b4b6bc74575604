"""
PPO with four models: actor, critic, frozen reward model, frozen reference.

    trl-ext reward && trl-ext ppo                     # the embedded demo
    trl-ext ppo --critic head                         # a value head on the actor's trunk
    trl-ext ppo --config configs/ppo/documents.yaml   # exactly the documents' loss
    trl-ext ppo --model my-sft --reward_model_path my-reward --dataset_name prompts.jsonl --output_dir out
    trl-ext ppo … --use_peft --load_in_4bit --critic adapter   # four roles on one base in 4 bits

The data have a column `prompt`, text or conversation. Held-out prompts are answered and scored before and after. The
output folder gets the actor and its tokenizer, the critic in critic/, metrics.json, report.html with its picture, and
samples.md with completions before and after.
"""

import math
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import DatasetDict

from ... import PPOConfigX, PPOTrainerX
from ...data import demo
from ...data.conversions import to_prompts
from ...data.json_values import plain_file
from ...report import (
    PPO_LINE,
    first_and_last_evaluation,
    pair_samples,
    print_samples,
    samples_markdown,
    use_brief_progress,
)
from ...runs.folder import checkpoint_of
from ..closing import closing_lines, program, report_callbacks, running, without
from ..data import DataArguments, load_splits
from ..dry_run import dry_run
from ..fit import require_fit
from ..launch import LaunchArguments, launch, launches, require_all
from ..models import ModelArguments, model_errors, path_of, require_adapted, require_judges
from ..options import Options, read, usage_errors


DEMO = "ppo/demo"
# Before and after need an evaluation at the start, and the completions that TRL writes down, not those it prints.
DEFAULTS = {
    "eval_on_start": True,
    "log_completions": True,
    "num_completions_to_print": 0,
    "num_sample_generations": 0,
    "logging_first_step": True,
}


@dataclass
class PPOArguments(LaunchArguments, DataArguments):
    TOPIC: ClassVar[str] = "Critic, samples, and the embedded prompts"

    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Critic to start from, such as critic/ of an earlier run. Unset: a copy of the reward model."
        },
    )
    prompt_words: int = field(default=4, metadata={"help": "Words of an embedded review to put in the prompt."})
    samples: int = field(default=8, metadata={"help": "Held-out prompts to show with completions before and after."})


def load(data: PPOArguments) -> DatasetDict:
    def openings(train_size: int | None, test_size: int | None) -> DatasetDict:
        return demo.prompts(data.prompt_words, train_size, test_size)

    return load_splits(data, openings, to_prompts)


def build(data: PPOArguments, model: ModelArguments, args: PPOConfigX) -> PPOTrainerX:
    path = path_of(model, args)
    require_judges(args.reward_model_path, data.value_model)
    args.model_init_kwargs = model.init_kwargs(args.use_cpu) | (args.model_init_kwargs or {})
    adapter, quantization = model.adapter(), model.quantization()
    splits = load(data)
    with model_errors(model):
        trainer = PPOTrainerX(
            args,
            model=path,
            train_dataset=splits["train"],
            value_model=data.value_model,
            eval_dataset=splits["test"],
            peft_config=adapter,
            quantization_config=quantization,
        )
    require_adapted(trainer.model, model)
    return trainer


def report(trainer: PPOTrainerX, before: dict[str, Any] | None, after: dict[str, Any], shown: int) -> None:
    """
    Before and after on the terminal and in metrics.json; samples.md. Without an evaluation at the start there is no
    before, and there are no samples of it.
    """
    output, args = Path(trainer.args.output_dir), trainer.args
    columns = {"after": after} if before is None else {"before": before, "after": after}
    (output / "metrics.json").write_text(plain_file(columns), encoding="utf-8")
    if args.log_completions and before is not None:
        samples = pair_samples(output / "completions", before["step"], after["step"])[:shown]
        (output / "samples.md").write_text(samples_markdown(samples))
        print_samples(samples)
    rise, half_width, kl = (
        after.get(f"eval_{key}", float("nan")) for key in ("reward/rise", "reward/rise_ci95", "kl/ref")
    )
    scores = ", ".join(f"{metrics['eval_reward/score']:+.3f} {when}" for when, metrics in columns.items())
    interval = f" ± {half_width:.3f} (95%)" if math.isfinite(half_width) else ""  # one prompt has none
    rose = f"; it rose by {rise:.3f}{interval}" if before is not None and math.isfinite(rise) else ""
    print(f"Held-out score: {scores}{rose}. KL to the reference: {kl:.2f} nats per sequence.")


def options(argv: list[str] | None = None) -> Options:
    return read("ppo", (PPOArguments, ModelArguments, PPOConfigX), __doc__, argv, DEMO, DEFAULTS)


def closing(given: Options, args: PPOConfigX, model: ModelArguments) -> str:
    """How to look at the run, resume it, talk to the actor, and start another run from what this one has left."""
    others = {"chat": f"trl-ext chat {shlex.quote(args.output_dir)}"}
    if not model.use_peft:  # an adapter is no model to start from
        options = {"model": args.output_dir, "output_dir": f"{args.output_dir}-next"}
        if args.critic == "model":
            options["value_model"] = f"{args.output_dir}/critic"
        flags = [word for name, value in options.items() for word in (f"--{name}", value)]
        same = without(given.argv, *options, "model_name_or_path", "resume_from_checkpoint")
        others["next"] = f"{program('ppo')} {shlex.join([*same, *flags])}"
    return closing_lines("ppo", args.output_dir, given.argv, **others)


def main(argv: list[str] | None = None) -> None:
    with usage_errors():
        given = options(argv)
        if given.dry_run:
            return dry_run("ppo", given, load)
        if launches(given):
            return launch("ppo", given)
        data, model, args = given.make()
        require_all(args)
        checkpoint = checkpoint_of(args.resume_from_checkpoint, args.output_dir)
    require_fit("ppo", data, model, args)
    with usage_errors():
        trainer = build(data, model, args)
    use_brief_progress(trainer, PPO_LINE)
    for callback in report_callbacks(data.source):
        trainer.add_callback(callback)
    with running("ppo", given, args):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    before, after = first_and_last_evaluation(trainer, "eval_reward/score")
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        report(trainer, before, after, data.samples)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        print(closing(given, args, model))
