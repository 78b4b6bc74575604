"""`PreferenceAccuracyCallback`: log the accuracy on pairs with its interval, for trainers that log a bare mean."""

from typing import Any

from transformers import TrainerCallback

from ..runs.log import is_tie
from ..statistics import wilson_interval


# What `DPOTrainer` and `RewardTrainer` call the share of pairs in the right order, in training.
NAMES = ("rewards/accuracies", "accuracy")


class PreferenceAccuracyCallback(TrainerCallback):
    """
    Adds `preference/accuracy`, its 95% interval (Wilson) and the number of pairs to the log lines of `trl.DPOTrainer`
    and `trl.RewardTrainer`, which log a mean over batches without the number of pairs; and prints the held-out
    accuracy at every evaluation. Adds nothing to the lines of `DPOTrainerX`, which has all of that.

    The keys go into `state.log_history`, hence into checkpoints and the report; dashboards of `report_to` have
    received the line before a callback is called. In an evaluation whose last batch is smaller, a mean over batches
    is not the share of pairs, and the sentence says "about".
    """

    def __init__(self) -> None:
        self._step_of_last_line = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_of_last_line = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = state.log_history[-1]
        if any(name in line for name in NAMES):
            per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            pairs = per_step * max(1, state.global_step - self._step_of_last_line)
            self._step_of_last_line = state.global_step
            _add_interval(line, "", pairs)
        try:
            held_out = len(kwargs["eval_dataloader"].dataset)
        except (KeyError, AttributeError, TypeError):  # no loader yet, or a stream
            held_out = 0
        if any(f"eval_{name}" in line for name in NAMES) and held_out:
            counted = "eval_pairs" in line or "eval_preference/accuracy" in line  # by the trainer, pair by pair
            _add_interval(line, "eval_", held_out)
            if state.is_world_process_zero:
                size = args.eval_batch_size * args.world_size
                about = "" if counted or held_out < size or held_out % size == 0 else "about "
                said = "held-out pairs are all ties; the policy is the reference."
                if not is_tie(line):
                    share, low, high = (line[f"eval_preference/accuracy{end}"] for end in ("", "_low", "_high"))
                    interval = f"(95% interval {low:.1%} to {high:.1%})"
                    pairs = line["eval_preference/pairs"]
                    said = f"{share:.1%} {interval} of {pairs:.0f} held-out pairs are in the right order."
                print(f"Step {state.global_step}: {about}{said}", flush=True)


def _add_interval(line: dict[str, Any], prefix: str, pairs: int) -> None:
    if f"{prefix}preference/accuracy" in line:
        return
    share = next(line[f"{prefix}{name}"] for name in NAMES if f"{prefix}{name}" in line)
    low, high = wilson_interval(share * pairs, pairs)
    line[f"{prefix}preference/accuracy"] = share
    line[f"{prefix}preference/accuracy_low"] = low
    line[f"{prefix}preference/accuracy_high"] = high
    line[f"{prefix}preference/pairs"] = float(pairs)
