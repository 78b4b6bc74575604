"""
PPO with four models: actor, critic, frozen reward model, frozen reference.

    python scripts/reward.py && python scripts/ppo.py           # the embedded demo
    python scripts/ppo.py --critic head                         # a value head on the actor's trunk
    python scripts/ppo.py --config configs/ppo/documents.yaml   # the documents' loss to the letter
    python scripts/ppo.py --model my-sft --reward_model_path my-reward --dataset_name prompts.jsonl --output_dir out
    python scripts/ppo.py … --use_peft --load_in_4bit --critic adapter   # four roles on one base in 4 bits

The data have a column `prompt`, text or conversation. Held-out prompts are answered and scored before and after. The
output folder gets the actor and its tokenizer, the critic in critic/, metrics.json, report.html with its picture, and
samples.md with completions before and after.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from torch.distributed.elastic.multiprocessing.errors import record
from trl import get_peft_config, get_quantization_config

from trl_ext import PPOConfigX, PPOTrainerX, ReportCallback, embedded
from trl_ext.cli import (
    DataArguments,
    FitArguments,
    ModelArguments,
    first_and_last_evaluation,
    load_splits,
    parse,
    require_fit,
)
from trl_ext.report import (
    PPO_LINE,
    pair_samples,
    print_samples,
    samples_markdown,
    use_brief_progress,
)


DEMO = Path(__file__).resolve().parents[1] / "configs" / "ppo" / "demo.yaml"
# Before and after need an evaluation at the start, and the completions that TRL writes down, not those it prints.
DEFAULTS = {
    "eval_on_start": True,
    "log_completions": True,
    "num_completions_to_print": 0,
    "num_sample_generations": 0,
}


@dataclass
class PPOArguments(FitArguments, DataArguments):
    prompt_words: int = field(default=4, metadata={"help": "Words of an embedded review that the prompt gives away."})
    prompts_seed: int = field(default=0, metadata={"help": "Seed of the embedded split: reward.py's `pairs_seed`."})
    samples: int = field(default=8, metadata={"help": "Held-out prompts to show with completions before and after."})


def load(data: PPOArguments) -> DatasetDict:
    def openings(train_size: int | None, test_size: int | None) -> DatasetDict:
        return embedded.prompts(data.prompt_words, train_size, test_size, seed=data.prompts_seed)

    return load_splits(data, openings)


def build(data: PPOArguments, model: ModelArguments, args: PPOConfigX) -> PPOTrainerX:
    path = model.model_name_or_path or args.sft_model_path or str(embedded.smollm2())
    args.model_init_kwargs = model.init_kwargs(args.use_cpu) | (args.model_init_kwargs or {})
    splits = load(data)
    return PPOTrainerX(
        args,
        model=path,
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )


def report(trainer: PPOTrainerX, before: dict[str, Any], after: dict[str, Any], shown: int) -> None:
    """Before and after on the terminal and in metrics.json; samples.md."""
    output, args = Path(trainer.args.output_dir), trainer.args
    (output / "metrics.json").write_text(json.dumps({"before": before, "after": after}, indent=2) + "\n")
    if args.log_completions:
        samples = pair_samples(output / "completions", before["step"], after["step"])[:shown]
        (output / "samples.md").write_text(samples_markdown(samples))
        print_samples(samples)
    rise, half_width, kl = (
        after.get(f"eval_{key}", float("nan")) for key in ("reward/rise", "reward/rise_ci95", "kl/ref")
    )
    print(
        f"Held-out score: {before['eval_reward/score']:+.3f} before, {after['eval_reward/score']:+.3f} after; it rose "
        f"by {rise:.3f} ± {half_width:.3f} (95%). KL to the reference: {kl:.2f} nats per sequence.\n"
        f"Model and metrics are in {output}; open {output / 'report.html'}"
    )


def main(argv: list[str] | None = None) -> None:
    data, model, args = parse((PPOArguments, ModelArguments, PPOConfigX), __doc__, DEMO, argv, DEFAULTS)
    require_fit("ppo", data, model, args)
    trainer = build(data, model, args)
    use_brief_progress(trainer, PPO_LINE)
    trainer.add_callback(ReportCallback(facts={"data": data.source}))
    trainer.train()
    before, after = first_and_last_evaluation(trainer, "eval_reward/score")
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        report(trainer, before, after, data.samples)


if __name__ == "__main__":
    record(main)()  # of several processes, torchrun names the one that failed first, and why
