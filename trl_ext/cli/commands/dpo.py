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

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import DPOConfigX, DPOTrainerX
from ...data.json_values import plain_file
from ...report import DPO_LINE, accuracy_text, first_and_last_evaluation, preference_table, use_brief_progress
from ...runs.folder import checkpoint_of
from ...runs.steps_left import require_steps_left
from ..closing import closing_lines, report_callbacks, running
from ..data import PairArguments, load_pairs, require_steps
from ..dry_run import dry_run
from ..fit import require_fit
from ..launch import LaunchArguments, launch, launches, require_all
from ..models import ModelArguments, model_errors, path_of, require_adapted
from ..options import Options, read, usage_errors


DEMO = "dpo/demo"
DEFAULTS = {"eval_on_start": True, "logging_first_step": True}


@dataclass
class DPOArguments(LaunchArguments, PairArguments):
    TOPIC: ClassVar[str] = "Old models"

    ignore_bias_buffers: bool = field(
        default=False,
        metadata={"help": "Keep boolean buffers out of DDP, which cannot broadcast those of old models."},
    )


def build(data: DPOArguments, model: ModelArguments, args: DPOConfigX) -> DPOTrainerX:
    path = path_of(model)
    args.model_init_kwargs = model.init_kwargs(args.use_cpu) | (args.model_init_kwargs or {})
    adapter, quantization = model.adapter(), model.quantization()
    splits = load_pairs(data)
    require_steps(splits["train"], args.max_steps)
    with model_errors(model):
        trainer = DPOTrainerX(
            path,
            args=args,
            train_dataset=splits["train"],
            eval_dataset=splits["test"],
            peft_config=adapter,
            quantization_config=quantization,
        )
    require_adapted(trainer.model, model)
    if data.ignore_bias_buffers:
        buffers = trainer.model.named_buffers()
        trainer.model._ddp_params_and_buffers_to_ignore = [name for name, b in buffers if b.dtype == torch.bool]
    return trainer


def report(trainer: DPOTrainerX, before: dict[str, Any] | None, after: dict[str, Any]) -> None:
    """Accuracy on the terminal; metrics.json, table.md. Without an evaluation at the start there is no before."""
    output = Path(trainer.args.output_dir)
    columns = {"after": after} if before is None else {"before": before, "after": after}
    (output / "metrics.json").write_text(plain_file(columns), encoding="utf-8")
    (output / "table.md").write_text(preference_table(columns))
    accuracies = "; ".join(f"{accuracy_text(metrics)} {when}" for when, metrics in columns.items())
    print(
        f"Held-out pairs in the right order: {accuracies}, of "
        f"{after['eval_preference/pairs']:.0f}. Margin {after['eval_rewards/margins']:+.3f}; log π/π_ref "
        f"{after['eval_logps/chosen_drift']:+.2f} of chosen, {after['eval_logps/rejected_drift']:+.2f} of rejected "
        "completions."
    )


def options(argv: list[str] | None = None) -> Options:
    return read("dpo", (DPOArguments, ModelArguments, DPOConfigX), __doc__, argv, DEMO, DEFAULTS)


def main(argv: list[str] | None = None) -> None:
    with usage_errors():
        given = options(argv)
        if given.dry_run:
            return dry_run("dpo", given, load_pairs)
        if launches(given):
            return launch("dpo", given)
        data, model, args = given.make()
        require_all(args)
        checkpoint = checkpoint_of(args.resume_from_checkpoint, args.output_dir)
        require_steps_left(checkpoint, args.max_steps)
    require_fit("dpo", data, model, args)
    with usage_errors():
        trainer = build(data, model, args)
    use_brief_progress(trainer, DPO_LINE)
    for callback in report_callbacks(data.source):
        trainer.add_callback(callback)
    with running("dpo", given, args):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    before, after = first_and_last_evaluation(trainer, "eval_preference/accuracy")
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        report(trainer, before, after)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=data.dataset_name)
    if trainer.is_world_process_zero():
        print(closing_lines("dpo", args.output_dir, given.argv, chat=f"trl-ext chat {shlex.quote(args.output_dir)}"))
