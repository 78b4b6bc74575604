"""Run a training command, `trl-ext ppo`, `dpo` or `reward`: parse, check, load, train, evaluate, save, close."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from ..callbacks import ProfileCallback
from ..data.json_values import plain_file
from ..ppo.checkpoint import known_length
from ..report import first_and_last_evaluation
from ..report.progress import use_brief_progress
from ..report.run import read_run
from ..runs.checkpoints import checkpoint_of, require_same_run
from ..runs.failures import writing
from ..runs.steps_left import require_steps_left
from .closing import closing_lines, preparing, report_callbacks, running, saving_last
from .data import note_on_data
from .dry_run import batches, dry_run, require_dry_run
from .errors import usage_errors
from .fit import require_fit
from .launch import launch, launches, require_all
from .models import ModelArguments, model_errors, path_of, require_adapted, require_judges
from .options import Options, read
from .output import beside, remove_older_adapters, require_free
from .parser import OptionParser


@dataclass(frozen=True)
class TrainingCommand:
    """What is a training command's own. `data`, `model` and `args` are its options, instances of the three classes."""

    name: str  # "ppo", "critic", "dpo" or "reward"
    description: str | None  # what `--help` begins with
    classes: tuple[type, ...]  # of the options: launch and data; `ModelArguments`; the trainer's config
    defaults: Mapping[str, Any]  # of options, where they differ from those of the classes
    line: dict[str, tuple[str, str]]  # metrics of the progress line
    load: Callable[[Any], DatasetDict]  # the splits `train` and `test`, from `data`
    # The trainer, from the model's path, `args`, `data`, the splits; `peft_config`, `quantization_config` by name.
    create: Callable[..., Any]
    evaluate: Callable[[Any], dict[str, Any]]  # of the trained model, on every rank: what goes into metrics.json
    # Prints and writes the results, on the main process, from the trainer, these metrics, `data` and `model`.
    report: Callable[[Any, dict[str, Any], Any, ModelArguments], None]
    # What else can be done, and by which command line, from the options, `data`, `model` and `args`.
    further: Callable[[Options, Any, ModelArguments, Any], dict[str, str]]
    adapter: tuple[Any, ...] = ()  # arguments of `ModelArguments.adapter`

    def arguments(self) -> OptionParser:
        parser = OptionParser(self.name, self.classes, description=self.description)
        parser.set_defaults_with_config(**self.defaults)
        return parser

    def options(self, argv: list[str] | None = None) -> Options:
        return read(self.arguments(), argv, f"{self.name}/demo")

    def build(self, data: Any, model: ModelArguments, args: Any) -> Any:
        """Return the trainer of these options; models are checked before any row is read."""
        path, is_adapter = path_of(model, args, self.name)
        require_judges(args, data)
        args.model_init_kwargs = model.init_kwargs(args.use_cpu, is_adapter) | (args.model_init_kwargs or {})
        new_adapter = model.adapter(*self.adapter, is_adapter=is_adapter)
        loading = {"peft_config": new_adapter, "quantization_config": model.quantization()}
        splits = self.load(data)
        with model_errors(model, path):
            trainer = self.create(path, args, data, splits, **loading)
        require_adapted(trainer.model, model)
        note = note_on_data(data, splits["train"], trainer.processing_class)
        if note and trainer.is_world_process_zero():
            print(note, file=sys.stderr)
        return trainer

    def run(self, argv: list[str] | None = None) -> None:
        begun = time.time()
        with usage_errors():
            given = self.options(argv)
        with usage_errors(given.wording):
            require_free(given)
            if given.dry_run:
                return dry_run(self.name, given, self.load)
            require_dry_run(given)
            if launches(given):
                return launch(self.name, given)
        with preparing(given.output_dir):
            with usage_errors(given.wording):
                data, model, args = given.make()
                require_all(args)
                checkpoint = checkpoint_of(args.resume_from_checkpoint, args.output_dir)
                require_steps_left(checkpoint, args.max_steps)
                if checkpoint is not None:
                    require_same_run(checkpoint, args)
                args.resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
            require_fit(self.name, data, model, args)
            with usage_errors(given.wording):
                trainer = self.build(data, model, args)
            use_brief_progress(trainer, self.line)
            facts = {"data": data.source}
            if rewards := getattr(trainer, "reward_func_names", None):
                facts["rewards"] = ", ".join(rewards)
            for callback in report_callbacks(facts):
                trainer.add_callback(callback)
            if data.profile:
                trainer.add_callback(ProfileCallback(trainer))
        if self.name in ("dpo", "reward") and trainer.is_world_process_zero():  # the others print their own
            print(batches(self.name, args, known_length(trainer.train_dataset), args.world_size)[1])
        with running(self.name, given, args):
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            with saving_last(args):
                trainer.save_model()  # before the evaluation, which may take long and be interrupted
            metrics = self.evaluate(trainer)
            with writing("What comes after the model, which is saved,", Path(args.output_dir)):
                self._write_results(trainer, metrics, data, model, begun)
        if args.push_to_hub:
            trainer.push_to_hub(dataset_name=data.dataset_name)
        if trainer.is_world_process_zero():
            print(closing_lines(self.name, args.output_dir, given.argv, **self.further(given, data, model, args)))

    def _write_results(
        self, trainer: Any, metrics: dict[str, Any], data: Any, model: ModelArguments, begun: float
    ) -> None:
        trainer.save_state()
        if trainer.is_world_process_zero():
            output = Path(trainer.args.output_dir)
            remove_older_adapters(output, begun)
            (output / "metrics.json").write_text(plain_file(metrics), encoding="utf-8")
            self.report(trainer, metrics, data, model)
            for alarm in read_run(output).alarms:  # those of the report
                print(f"Alarm: {alarm}.")
        trainer.create_model_card(dataset_name=data.dataset_name)


def before_and_after(trainer: Any, key: str) -> dict[str, dict[str, Any]]:
    """Return the last evaluation with the metric `key`, and that from before the first step where there is one."""
    before, after = first_and_last_evaluation(trainer, key)
    return {"after": after} if before is None else {"before": before, "after": after}


def chat_with(args: Any) -> dict[str, str]:
    return {"chat": f"trl-ext chat {shlex.quote(args.output_dir)}"}


def merge_of(args: Any) -> dict[str, str]:
    return {
        "merge": f"trl-ext merge {shlex.join([args.output_dir, '--output_dir', beside(args.output_dir, 'merged')])}"
    }
