"""
DPO: teach a model what people prefer, from pairs of answers.

    trl-ext dpo                                       # the embedded demo
    trl-ext dpo --config configs/dpo/documents.yaml   # the documents' numbers
    trl-ext dpo --model my-sft --dataset_name pairs.jsonl --output_dir out

The pairs have the columns `chosen` and `rejected`, text or conversation, with or without `prompt`; with a column
`source`, each source gets an accuracy of its own. All flags of `trl dpo` are accepted. Held-out pairs are scored
before and after. The output folder gets the model (with --use_peft its adapter), the tokenizer, metrics.json,
report.html with its picture, and the implicit rewards before and after in table.md.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import DatasetDict

from ... import DPOConfigX, DPOTrainerX
from ...report import DPO_LINE, accuracy_text, preference_table
from ..data import PairArguments, load_pairs, require_steps
from ..launch import LaunchArguments
from ..models import ModelArguments
from ..training import TrainingCommand, before_and_after, chat_with


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
        f"{after['eval_preference/pairs']:.0f}. Margin {after['eval_rewards/margins']:+.3f}; log π/π_ref "
        f"{after['eval_logps/chosen_drift']:+.2f} of chosen, {after['eval_logps/rejected_drift']:+.2f} of rejected "
        "completions."
    )


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
    further=lambda given, data, model, args: chat_with(args),
)
main = COMMAND.run
