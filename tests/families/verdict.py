"""What became of a family: the outcome, its reason in a line, how far numbers were apart; and what is allowed."""

import traceback
from dataclasses import dataclass, field


NOISE = 0.1  # dropout and jitter of the configs, which training must switch off
ROUNDINGS = 3.0  # in bfloat16: times what rounding alone does to the plain forward
WITHOUT_AUX_LOSS = {"router_aux_loss_coef": 0.0}


@dataclass
class Verdict:
    """
    Args:
        outcome: "exact", "refused" (a `ValueError` before the first step), "transformers fails" or "TRL fails" (there
            is nothing to compare with); or what must not be: "wrong" and "crashed".
        rows: how DPO read the pairs: "shared rows" or "TRL's rows".
        reason: for what was not exact, or not shared.
        numbers: relative differences by name; what is above 1 is over its tolerance.
    """

    outcome: str
    rows: str = ""
    reason: str = ""
    numbers: dict[str, float] = field(default_factory=dict)


def is_refusal(error: Exception) -> bool:
    """Whether trl_ext itself says no; a `ValueError` from the depths of another library is a crash."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and "/trl_ext/" in raised_in
