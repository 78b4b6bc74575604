"""Log a training and the evaluations after it as one run in trackio."""

import time
from pathlib import Path
from typing import Any

from transformers.integrations import TrackioCallback


def name_run(args: Any) -> None:
    """Name a run for trackio, which would give each part of it, begun with `trackio.init`, a name of its own."""
    if "trackio" in (args.report_to or ()) and args.run_name is None:
        args.run_name = f"{Path(args.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def go_on_logging(trainer: Any) -> None:
    """Open the run again that trackio has closed with the training: evaluations belong to it, and TRL logs to it."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackioCallback) and not callback._initialized:
            callback.setup(trainer.args, trainer.state, trainer.model)
