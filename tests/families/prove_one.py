"""One family through both trainers."""

import dataclasses
from typing import Any

import torch

from plain import one_line

from . import dpo_family, ppo_family
from .configs import family_config, family_model


Result = dict[str, Any]


def prove(family: str, noise: float) -> Result:
    """What becomes of a family in the trainers, or why it cannot be built."""
    try:
        model = family_model(family_config(family))
        with torch.no_grad():
            model(input_ids=torch.arange(3, 43)[None])
    except Exception as error:  # whatever it is, it is said in the table
        return {"family": family, "not built": one_line(error)}
    result: Result = {"family": family, "model": type(model).__name__}
    for trainer, proof in (("dpo", dpo_family), ("ppo", ppo_family)):
        verdicts = proof.judge(family, noise)
        result[trainer] = {name: dataclasses.asdict(verdict) for name, verdict in verdicts.items()}
    return result
