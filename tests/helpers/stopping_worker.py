"""Runs of PPO in two processes, of which a signal to the second one stops both, and which go on from there."""

import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import resume_worker
import zero_runs
from trl_ext.runs.checkpoints import fault_of
from trl_ext.runs.signals import StoppedBySignal


class SendsInStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def sends_in_rollout(trainer: Any) -> None:
    """While the second rollout is scored."""
    score = trainer._calculate_rewards

    def send(*args: Any) -> Any:
        if trainer.state.global_step == 4 and trainer.args.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args)

    trainer._calculate_rewards = send


def run(folder: Path, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    options = layout["options"] | {"save_strategy": "no", "save_on_signal": True}
    layout, measured = layout | {"options": options}, {}
    for part in ("whole", "stopped", "resumed"):
        with zero_runs.launched(layout["environment"]):
            output = folder / name / ("whole" if part == "whole" else "stopped")
            trainer = resume_worker.trainer_of(folder, output, layout)
            if part == "stopped":
                if layout["amid"] == "step":
                    trainer.add_callback(SendsInStep())
                else:
                    sends_in_rollout(trainer)
                try:
                    trainer.train()
                except StoppedBySignal as stop:
                    fault = fault_of(stop.checkpoint)
                    measured[part] = {"code": stop.code, "step": stop.step, "fault": fault}
            else:
                trainer.train(resume_from_checkpoint=part == "resumed")
                measured[part] = resume_worker.results(trainer)
            del trainer
    return measured


def measure(folder: Path, layouts: dict[str, Any]) -> dict[str, Any]:
    return {name: run(folder, name, layout) for name, layout in layouts.items()}
