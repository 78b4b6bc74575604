"""
PPO with four models: actor, critic, frozen reward model, frozen reference.

    trl-ext reward && trl-ext ppo                     # the embedded demo
    trl-ext ppo --critic head                         # a value head on the actor's trunk
    trl-ext ppo --config configs/ppo/zhang2025.yaml   # the loss of docs/theory.md
    trl-ext ppo --model my-sft --reward_model_path my-reward --dataset_name prompts.jsonl --output_dir out
    trl-ext ppo … --use_peft --load_in_4bit --critic adapter   # four roles on one base in 4 bits

The data have a column `prompt`, text or conversation. Held-out prompts are answered and scored before and after. The
output folder gets the actor and its tokenizer, the critic in critic/, metrics.json, report.html with its picture, and
samples.md with completions before and after.
"""

import math
import shlex
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from datasets import DatasetDict

from ... import PPOConfigX, PPOTrainerX
from ...data import demo
from ...data.conversions import to_prompts
from ...models.loading import load_tokenizer, source_options
from ...report import pair_samples, print_samples, samples_markdown
from ...report.progress import PPO_LINE
from ..closing import program, without
from ..data import DataArguments, load_splits
from ..launch import LaunchArguments
from ..models import ModelArguments
from ..options import Options
from ..output import beside
from ..reward_functions import reward_functions, try_on
from ..training import TrainingCommand, before_and_after, chat_with, merge_of


@dataclass
class PPOArguments(LaunchArguments, DataArguments):
    TOPIC: ClassVar[str] = "Critic, samples, and the embedded prompts"

    value_model: str | None = field(
        default=None,
        metadata={
            "help": "Critic to start from, such as the output folder of `trl-ext critic`, or critic/ of an earlier "
            "run. Unset: a copy of the reward model."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Reward functions, with or in place of a reward model: `my_rewards.right` of my_rewards.py in "
            "this folder, `other/file.py:right`, or a name in `trl.rewards`, such as accuracy_reward. They get the "
            "columns of the dataset, and are weighed by `reward_weights`."
        },
    )
    prompt_words: int = field(default=4, metadata={"help": "Words of an embedded review to put in the prompt."})
    samples: int = field(default=8, metadata={"help": "Held-out prompts to show with completions before and after."})


def load(data: PPOArguments) -> DatasetDict:
    reward_functions(data.reward_funcs)  # a wrong name is found before any row is read
    return load_splits(data, partial(demo.prompts, data.prompt_words), to_prompts)


def rewards(path: str, args: PPOConfigX, data: PPOArguments, splits: DatasetDict) -> dict[str, Any]:
    """Return the reward model, and the reward functions, which are tried on the first prompt."""
    functions = reward_functions(data.reward_funcs)
    if functions:
        try_on(functions, next(iter(splits["train"])), load_tokenizer(path, **source_options(args)), args)
    return {"reward_model": args.reward_model_path, "reward_funcs": functions}


def create(path: str, args: PPOConfigX, data: PPOArguments, splits: DatasetDict, **loading: Any) -> PPOTrainerX:
    datasets = {"train_dataset": splits["train"], "eval_dataset": splits["test"]}
    given = rewards(path, args, data, splits) | datasets
    return PPOTrainerX(args, model=path, value_model=data.value_model, **given, **loading)


def report(trainer: PPOTrainerX, columns: dict[str, Any], data: PPOArguments, *_: Any) -> None:
    """Print scores before and after; write samples.md. Without an evaluation at the start there are no samples."""
    output, after = Path(trainer.args.output_dir), columns["after"]
    if trainer.args.log_completions and "before" in columns:
        samples = pair_samples(output / "completions", columns["before"]["step"], after["step"])[: data.samples]
        (output / "samples.md").write_text(samples_markdown(samples))
        print_samples(samples)
    keys = ("reward/rise", "reward/rise_ci95", "kl/ref")
    rise, half_width, kl = (after.get(f"eval_{key}", float("nan")) for key in keys)
    scores = ", ".join(f"{metrics['eval_reward/score']:+.3f} {when}" for when, metrics in columns.items())
    interval = f" ± {half_width:.3f} (95%)" if math.isfinite(half_width) else ""  # one prompt has none
    unseen = ", not distinguishable from 0" if abs(rise) <= half_width < math.inf else ""
    way = "fell" if rise < 0 else "rose"
    moved = f"; it {way} by {abs(rise):.3f}{interval}{unseen}" if rise else "; it has not changed"
    rose = moved if "before" in columns and math.isfinite(rise) else ""
    print(f"Held-out score: {scores}{rose}. KL to the reference: {kl:z.2f} nats per sequence.")


def further(given: Options, data: PPOArguments, model: ModelArguments, args: PPOConfigX) -> dict[str, str]:
    """Return how to talk to the actor, and how to start another run from what this one has left."""
    out = args.output_dir
    has_adapter = (Path(out) / "adapter_config.json").is_file()
    options = {"model": out, "output_dir": beside(out, "next"), "value_model": str(Path(out) / "critic")}
    if model.use_peft:  # the adapter goes on being trained
        options["use_peft"] = "False"
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    of_adapter = [each.name for each in fields(model) if each.name.startswith("lora_")] if has_adapter else []
    same = without(given.argv, *options, *of_adapter, "model_name_or_path", "overwrite", "resume_from_checkpoint")
    merge = merge_of(args) if has_adapter else {}
    return chat_with(args) | merge | {"next": f"{program('ppo')} {shlex.join([*same, *flags])}"}


COMMAND = TrainingCommand(
    name="ppo",
    description=__doc__,
    classes=(PPOArguments, ModelArguments, PPOConfigX),
    # Before and after need an evaluation at the start, and the completions that TRL writes down, not those it prints.
    defaults={
        "eval_on_start": True,
        "log_completions": True,
        "num_completions_to_print": 0,
        "num_sample_generations": 0,
        "logging_first_step": True,
        "save_on_signal": True,
    },
    line=PPO_LINE,
    load=load,
    create=create,
    evaluate=lambda trainer: before_and_after(trainer, "eval_reward/score"),
    report=report,
    further=further,
)
main, arguments = COMMAND.run, COMMAND.arguments
