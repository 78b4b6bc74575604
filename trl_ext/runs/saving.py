"""
How a trainer saves: checkpoints that are complete or absent, and one more when a signal stops the run. What ends a run
from outside says what is saved.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..ranges import SWITCH, one_of
from .checkpoints import (
    DIGESTS,
    SAVING,
    agreed_fault,
    begin,
    checkpoint_of,
    complete,
    delete_all_but,
    leave_unfinished,
    processes_of,
    require_same_run,
    require_trained,
    rotate,
    size_of,
    written_by,
)
from .failures import RunError, about_memory, about_the_disk, is_of_the_disk, is_out_of_memory
from .folder import STATE
from .signals import SignalWatch, StopAmidStep, StoppedBySignal, start_worker
from .steps_left import has_steps_left


logger = logging.getLogger(__name__)

OTHER_PROCESSES = (
    "%s was saved by %d processes, and this run has %d, with as many rows in an optimizer step: it goes on with the "
    "same rows in the same order, but sums are rounded otherwise, dropout draws other numbers where it is on, and the "
    "last step of an epoch may differ where its rows are no multiple of a step's."
)


@dataclass
class SavingOptions:
    TOPIC: ClassVar[str] = "Checkpoints"
    ALGORITHM: ClassVar[str]
    STATE_BY_PROCESS: ClassVar[bool] = False  # whether each process saves a state that no other can go on from

    checkpoint_digest: Annotated[str, one_of(*DIGESTS)] = field(
        default="small",
        metadata={
            "help": "Files of a checkpoint whose sha256 goes into its manifest, and is compared before a run is "
            "resumed: 'small', those of up to 1 GB, or 'full', all. The sizes of all are compared in any case.",
            "choices": list(DIGESTS),
        },
    )
    save_on_signal: Annotated[bool, SWITCH] = field(
        default=False,
        metadata={
            "help": "At SIGTERM or the first Ctrl-C end the step, save, and exit with status 143 or 130; the second "
            "one ends the run at once. On in the commands, off in Python."
        },
    )


def check_saving(args: Any) -> None:
    """Raise `ValueError` for options of saving that do not go together."""
    if args.save_on_signal and args.enable_jit_checkpoint:
        raise ValueError(
            "`save_on_signal` and `enable_jit_checkpoint` both wait for SIGTERM. Keep `save_on_signal`, which saves "
            "after the optimizer's step, on all ranks at the same one."
        )


class SavesWhole:
    """
    A trainer whose checkpoints are complete or absent (`checkpoints.py`), and which a signal stops with one. Name it
    before TRL's trainer.

    transformers' `enable_jit_checkpoint` is not built upon: it knows SIGTERM alone, waits 3 s, saves before the
    optimizer has stepped, asks no other rank, and the program exits as after a success.
    """

    args: Any
    state: Any
    control: Any
    accelerator: Any
    callback_handler: Any
    model: Any
    _saves_now = False
    _saved_at: tuple[int, int] | None = None  # step and log lines of the last checkpoint
    _signals: SignalWatch | None = None
    _resumed_from: Path | None = None
    _last_complete: Path | None = None  # of this run, or the one that it was resumed from
    _has_stepped = False  # since it began or was resumed
    _passed_step = -1  # the last one that came to `_maybe_log_save_evaluate`

    # ---- Resume, and stop ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; `True` resumes from the newest complete checkpoint in `output_dir`."""
        checkpoint = checkpoint_of(resume_from_checkpoint, self.args.output_dir)
        self._saved_at, self._resumed_from, self._has_stepped, self._passed_step = None, checkpoint, False, -1
        self._last_complete = checkpoint
        if checkpoint is not None:
            require_same_run(checkpoint, self.args)
            require_trained(checkpoint, self.model, self.args)
            if self.args.process_index == 0 and processes_of(checkpoint) not in (None, self.args.world_size):
                logger.warning(OTHER_PROCESSES, checkpoint, processes_of(checkpoint), self.args.world_size)
        self._warn_of_space(self._size_of_one(), "A checkpoint")
        train: Any = super().train  # type: ignore[misc]
        with self._watching(), self._saying_what_is_saved():
            try:
                output = train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
                if self._signals is not None and self._signals.received:
                    logger.warning("The signal came at the last step: the run is done and ends as usual.")
                return output
            except StopAmidStep:
                self._back_to_step_end()
                stop = self._stop()
            except StoppedBySignal as reached:
                stop = reached
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.accelerator.wait_for_everyone()  # a launcher ends all of them as soon as one has ended
            raise stop from None

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if not getattr(self.args, "save_on_signal", False):
            yield
            return
        self._signals = SignalWatch(speaks=self.args.process_index == 0)
        try:
            with self._signals:
                yield
        finally:
            self._signals = None

    def _signal(self) -> int:
        """Return the number of a signal that any rank has got, the same on every rank; 0 for none."""
        if self._signals is None:
            return 0
        mine = torch.tensor([self._signals.received or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(mine).max())

    @property
    def age_of_signal(self) -> float:
        """Return the seconds since this process has got a signal, 0 if it has got none."""
        return 0.0 if self._signals is None else self._signals.age

    def stop_between_phases(self) -> None:
        """Leave the step if a signal has come to any rank; nothing of it may be learned yet."""
        if self._signal():
            raise StopAmidStep

    @contextmanager
    def leaving_failed_step(self) -> Iterator[None]:
        """Within the context, an error after a signal, such as of a server that is away, still ends the run saved."""
        try:
            yield
        except StopAmidStep:
            raise
        except Exception as error:
            # Of several processes, the others may wait for this one.
            if self._signals is None or not self._signals.received or self.args.world_size > 1:
                raise
            logger.warning("The step is left, as a signal asks, after %s: %s", type(error).__name__, error)
            raise StopAmidStep from error

    def _note_step_end(self) -> None:
        """Note what `_back_to_step_end` needs, where a step may be left."""

    def _back_to_step_end(self) -> None:
        """Forget what the step that was left has changed."""

    def _stop(self) -> StoppedBySignal:
        """Save unless that is done, and return what ends the program."""
        number, step, folder = self._signal(), self.state.global_step, self._resumed_from
        if self._has_stepped:
            self._save_unless_saved()
            folder = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        return StoppedBySignal(number, step, folder)

    def _save_unless_saved(self) -> None:
        if self._saved_at != self._now():
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _now(self) -> tuple[int, int]:
        return self.state.global_step, len(self.state.log_history)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        step, self._has_stepped = self.state.global_step, True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)  # type: ignore[misc]
        is_done = step >= self.state.max_steps or self.control.should_training_stop
        # After the last step of an epoch the Trainer comes here again, and may evaluate.
        comes_again = self.state.epoch == int(self.state.epoch) and step != self._passed_step
        self._passed_step = step
        if not is_done and not comes_again and self._signal():
            raise self._stop()
        if self._signals is not None:
            self._note_step_end()

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        if getattr(self.args, "save_on_signal", False) and loader.num_workers:
            of_torch = getattr(loader, "base_dataloader", loader)  # accelerate's wraps one
            of_torch.worker_init_fn = partial(start_worker, of_torch.worker_init_fn)
        return loader

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # An evaluation may take longer than there is time for; after it there is another save, with its results.
        if self._has_stepped and self._signal():
            self._save_unless_saved()
        return super()._evaluate(*args, **kwargs)  # type: ignore[misc]

    # ---- Fail ----

    @contextmanager
    def _saying_what_is_saved(self) -> Iterator[None]:
        """Within the context, an error has a note of what is saved, and one of memory the phase and what lowers it."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                error.add_note(self._what_is_saved())
                raise
            phases = getattr(self, "phases", None)
            phase = phases.failed_in if phases is not None else "learn" if self.model.training else "evaluate"
            told = RunError(about_memory(error, phase, self.state.global_step, self._needing_less(phase)))
            told.add_note(self._what_is_saved())
            raise told from error

    def _needing_less(self, phase: str | None) -> str:
        """Return the options that lower the memory of a phase, as the end of a sentence; here of pairs."""
        if phase == "evaluate":
            return "lower `per_device_eval_batch_size`"
        if phase == "reference":
            return "lower `precompute_ref_batch_size`"
        ways = ["halve `per_device_train_batch_size` and double `gradient_accumulation_steps`"]
        ways += [] if self.args.gradient_checkpointing else ["set `gradient_checkpointing=True`"]
        ways += [] if getattr(self.args, "precompute_ref_log_probs", True) else ["set `precompute_ref_log_probs=True`"]
        return "; ".join([*ways, "lower `max_length`"])

    def _what_is_saved(self) -> str:
        last = self._last_complete
        if last is None or not last.is_dir():
            return "No checkpoint of this run is saved: it has to start again."
        if self.args.save_only_model:
            return f"The model of {last.name} is saved in {last}; with `save_only_model` no run goes on from it."
        if not has_steps_left(last):
            return f"{last.name} is complete, and has the model after the last step: {last}."
        return f"{last.name} is complete: `resume_from_checkpoint={str(last)!r}` goes on from there."

    @contextmanager
    def _writing(self, what: str, folder: Path) -> Iterator[None]:
        """Within the context, an error of the disk says what was not saved, why, and what to do."""
        try:
            yield
        except Exception as error:
            if isinstance(error, RunError) or not is_of_the_disk(error):
                raise
            is_checkpoint = folder.parent.name == SAVING
            in_all = self._size_of_one() if is_checkpoint else _expected_size(self.model, only_model=True)
            needed = max(0, in_all - size_of(folder)) if is_checkpoint else in_all
            said = about_the_disk(error, folder.parents[1] if is_checkpoint else folder, needed)
            if is_checkpoint and self.args.should_save:
                leave_unfinished(folder)
            raise RunError(f"{what} was not saved: {said}") from error

    def _size_of_one(self) -> int:
        """Return about how many bytes a checkpoint has: those of the last, or what is known before."""
        last = self._last_complete
        if last is None or not last.is_dir():
            return _expected_size(self.model, self.args.save_only_model)
        return size_of(last)

    # ---- Save ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self._saves_now:  # a checkpoint
            return super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        with self._saying_what_is_saved(), self._writing("The model", folder):
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]

    def _get_output_dir(self, trial: Any) -> str:
        """Return the run's folder; while a checkpoint is written, the one beside in which it is."""
        folder: str = super()._get_output_dir(trial)  # type: ignore[misc]
        return str(Path(folder) / SAVING) if self._saves_now else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(self._get_output_dir(trial))
        staged, final = run / SAVING / name, run / name
        if self.args.should_save and self._last_complete is not None and not run.is_dir():
            logger.warning("The folder %s is gone, with all that was in it; %s is saved into a new one.", run, name)
        with self._writing(name, staged):
            if self.args.should_save:
                begin(staged)
            self.accelerator.wait_for_everyone()
            self._saves_now = True
            try:
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._saves_now = False
            self.accelerator.wait_for_everyone()
            self._name_best(run, staged)
            if self.args.should_save:
                complete(staged, getattr(self.args, "checkpoint_digest", "small"), written_by(self.args))
        self.accelerator.wait_for_everyone()
        self._saved_at, self._last_complete = self._now(), final
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(final, self.args.save_total_limit, self.state.best_model_checkpoint)
            if self.state.global_step < self.state.max_steps:
                self._warn_of_space(size_of(final), "The next checkpoint")

    def _name_best(self, run: Path, staged: Path) -> None:
        """Name the best checkpoint by its place in the run's folder, where the Trainer, just now, did not look."""
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if self.state.best_global_step and (best == staged.name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / STATE))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        best = self.state.best_model_checkpoint
        if best is not None and self.args.load_best_model_at_end:
            fault = agreed_fault(Path(best))
            if fault is not None:  # before the newest one is deleted
                raise RunError(f"The best checkpoint, {best}, cannot be loaded, because {fault}. The run was done.")
        if best is not None and self.args.save_total_limit == 1 and self.args.should_save:
            # The Trainer is about to delete them where they are, file by file.
            delete_all_but(best, Path(self._get_output_dir(trial)))
        return super()._finalize_training(trial, *args, **kwargs)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._saves_now:  # it is pushed once it is complete
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def _warn_of_space(self, needed: int, what: str) -> None:
        """Warn if the disk has less room than a checkpoint needs: it is written before an old one is deleted."""
        if self.args.save_strategy == "no" or not self.args.should_save:
            return
        output = Path(self.args.output_dir).absolute()
        there = next(folder for folder in (output, *output.parents) if folder.is_dir())
        free = shutil.disk_usage(there).free
        if free < needed:
            logger.warning(
                "%s needs about %.1f GiB beside those that there are, and %s has %.1f GiB free. Free some before the "
                "next save, or lower `save_total_limit`.",
                *(what, needed / 2**30, there, free / 2**30),
            )


def _expected_size(model: Any, only_model: bool) -> int:
    """Return the bytes of a checkpoint as far as they are known before: weights, and, if it has them, AdamW's two."""
    sizes = {each: getattr(each, "ds_numel", each.numel()) for each in model.parameters()}  # of ZeRO-3, the whole
    saved = [each for each in sizes if each.requires_grad] if is_peft_model(model) else sizes
    weights = sum(sizes[each] * each.element_size() for each in saved)
    return weights + (0 if only_model else sum(8 * size for each, size in sizes.items() if each.requires_grad))
