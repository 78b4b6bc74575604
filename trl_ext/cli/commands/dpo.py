"""
DPO: teach a model what people prefer, from pairs of answers.

    trl-ext dpo                                       # the embedded demo
    trl-ext dpo --config configs/dpo/zhang2025.yaml   # the numbers of docs/theory.md's articles
    trl-ext dpo --model my-sft --dataset_name pairs.jsonl --output_dir out

The pairs have the columns `chosen` and `rejected`, text or conversation, with or without `prompt`; with a column
`source`, each source gets an accuracy of its own. All flags of `trl dpo` are accepted. Held-out pairs are scored
before and after. The output folder gets the model (with --use_peft its adapter), the tokenizer, metrics.json,
report.html with its picture, and the implicit rewards before and after in table.md.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import DatasetDict

from ... import DPOConfigX, DPOTrainerX
from ...models.loading import adapter_config
from ...models.saved_adapter import adapter_folder
from ...report import accuracy_text, preference_table
from ...report.progress import DPO_LINE
from ..closing import program
from ..data import PairArguments, flags_of, load_pairs, require_steps
from ..launch import LaunchArguments
from ..models import ModelArguments
from ..options import Options
from ..output import beside
from ..training import TrainingCommand, before_and_after, chat_with, merge_of


@dataclass
class DPOArguments(LaunchArguments, PairArguments):
    TOPIC: ClassVar[str] = "Old models"

    ignore_bias_buffers: bool = field(
        default=False,
        metadata={"help": "Keep boolean buffers out of DDP, which cannot broadcast those of old models."},
    )


def create(path: str, args: DPOConfigX, data: DPOArguments, splits: DatasetDict, **loading: Any) -> DPOTrainerX:
    require_steps(splits["train"], args.max_steps)
    trainer = DPOTrainerX(path, args=args, train_dataset=splits["train"], eval_dataset=splits["test"], **loading)
    if data.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [name for name, b in buffers if b.dtype == torch.bool]
    return trainer


def report(trainer: DPOTrainerX, columns: dict[str, Any], *_: Any) -> None:
    """Print the accuracy; write table.md."""
    (Path(trainer.args.output_dir) / "table.md").write_text(preference_table(columns))
    accuracies = "; ".join(f"{accuracy_text(metrics)} {when}" for when, metrics in columns.items())
    after = columns["after"]
    print(
        f"Held-out pairs in the right order: {accuracies}, of "
        f"{after['eval_preference/pairs']:.0f}. Margin {after['eval_rewards/margins']:+z.3f}; log π/π_ref "
        f"{after['eval_logps/chosen_drift']:+z.2f} of chosen, {after['eval_logps/rejected_drift']:+z.2f} of rejected "
        "completions."
    )


def further(given: Options, data: DPOArguments, model: ModelArguments, args: DPOConfigX) -> dict[str, str]:
    """Return how to talk to the policy, and how to go on: a reward model of the same pairs, and PPO against it."""
    named, out = model.model_name_or_path, args.output_dir
    saved = adapter_config(named and adapter_folder(named, model.model_revision))
    base = named if saved is None else saved.base_model_name_or_path
    has_adapter = model.use_peft or saved is not None
    reward = ["--model", base] if base else []
    reward += flags_of(data) + (["--use_peft", *model.bits()] if has_adapter else [])
    ppo = ["--model", out, *flags_of(data)]
    if has_adapter:  # both are adapters on the policy's base, and so is the critic
        targets = model.lora_target_modules or []
        targets = [targets] if isinstance(targets, str) else targets
        reward += ["--lora_target_modules", *targets] if targets else []
        ppo += ["--critic", "adapter", *model.bits()]
        ppo += [] if data.dataset_name else ["--use_peft", "False"]  # which the demo's recipe has
    if data.dataset_name or has_adapter:  # else the folder that PPO's own demo looks in
        judge = beside(out, "reward")
        reward += ["--output_dir", judge]
        ppo += ["--reward_model_path", judge, "--output_dir", beside(out, "ppo")]
    commands = chat_with(args) | (merge_of(args) if has_adapter else {})
    if not data.datasets:  # a mixture is in a recipe, not in flags
        commands["next"] = f"{program('reward')} {shlex.join(reward)} && {program('ppo')} {shlex.join(ppo)}"
    return commands


COMMAND = TrainingCommand(
    name="dpo",
    description=__doc__,
    classes=(DPOArguments, ModelArguments, DPOConfigX),
    defaults={"eval_on_start": True, "logging_first_step": True, "save_on_signal": True},
    line=DPO_LINE,
    load=load_pairs,
    create=create,
    evaluate=lambda trainer: before_and_after(trainer, "eval_preference/accuracy"),
    report=report,
    further=further,
)
main, arguments = COMMAND.run, COMMAND.arguments
