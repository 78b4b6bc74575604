"""Write one short line per log beside the progress bar, instead of a dictionary of forty metrics."""

from contextlib import nullcontext
from typing import Any

from transformers.trainer_callback import ProgressCallback

from ..runs.log import is_tie


# Log key -> its name in the line, and its format. A line shows the keys that are logged.
PPO_LINE = {
    "reward/score": ("reward", "+z.3f"),
    "eval_reward/score": ("held-out reward", "+z.3f"),
    "eval_reward/score_ci95": ("±", ".3f"),
    "kl/ref": ("KL", "z.3f"),
    "eval_kl/ref": ("KL", "z.3f"),
    "coef/kl": ("kl_coef", ".3g"),
    "loss": ("loss", "+z.4f"),
    "value/explained_variance": ("explained variance", "z.2f"),
    "completions/mean_length": ("tokens", ".1f"),
}
DPO_LINE = {
    "loss": ("loss", ".4f"),
    "preference/accuracy": ("accuracy", ".3f"),
    "rewards/margins": ("margin", "+z.3f"),
    "logps/chosen_drift": ("chosen drift", "+z.2f"),
    "logps/rejected_drift": ("rejected drift", "+z.2f"),
    "eval_loss": ("held-out loss", ".4f"),
    "eval_preference/accuracy": ("held-out accuracy", ".3f"),
    "eval_rewards/margins": ("margin", "+z.3f"),
}
CRITIC_LINE = {
    "loss": ("value loss", ".4f"),
    "eval_loss": ("held-out value loss", ".4f"),
    "eval_value/explained_variance_mc": ("held-out explained variance", "+z.3f"),
}
REWARD_LINE = {
    "loss": ("loss", ".4f"),
    "accuracy": ("accuracy", ".3f"),
    "margin": ("margin", ".3f"),
    "eval_loss": ("held-out loss", ".4f"),
    "eval_accuracy": ("held-out accuracy", ".3f"),
}


class BriefProgress(ProgressCallback):
    """The Trainer's progress bar, which writes the chosen metrics of each log; the log still has all of them."""

    def __init__(self, line: dict[str, tuple[str, str]]):
        super().__init__()
        self.line = line

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        text = brief_line(logs or {}, self.line)
        if state.is_world_process_zero and text:
            text = f"step {state.global_step}/{state.max_steps}  {text}"
            bars = [bar for bar in (self.prediction_bar, self.training_bar) if bar is not None]
            with bars[0].external_write_mode() if bars else nullcontext():  # which clears all of them
                print(text, flush=True)


def brief_line(logs: dict[str, Any], line: dict[str, tuple[str, str]]) -> str:
    """Return the chosen metrics of a log line as text; there is no accuracy while all pairs are ties."""
    known = {key: value for key, value in logs.items() if isinstance(value, int | float)}
    texts = {key: f"{known[key]:{form}}" for key, (_, form) in line.items() if key in known}
    if is_tie(known):
        texts |= {key: "all ties" for key in texts if key.endswith("preference/accuracy")}
    return "  ".join(f"{line[key][0]} {text}" for key, text in texts.items())


def use_brief_progress(trainer: Any, line: dict[str, tuple[str, str]]) -> None:
    """Put [`BriefProgress`] in the place of the Trainer's own bar; do nothing if bars are switched off."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(BriefProgress(line))
