"""One run in trackio for a training and the evaluations behind it."""

import time
from pathlib import Path
from typing import Any

from transformers.integrations import TrackioCallback


def name_run(args: Any) -> None:
    """Names a run for trackio, which would give each part of it, begun with `trackio.init`, a name of its own."""
    if "trackio" in (args.report_to or ()) and args.run_name is None:
        args.run_name = f"{Path(args.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def go_on_logging(trainer: Any) -> None:
    """
    Opens the run again that trackio has closed with the training. An evaluation behind it belongs to it, and TRL logs
    to it while it generates, which without a run is an error.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TrackioCallback) and not callback._initialized:
            callback.setup(trainer.args, trainer.state, trainer.model)
