"""The tokens of a rollout's responses with their credit, for callbacks and the report."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..runs.credit import answer_with_credit
from .rollout import Rollout


def credit_of_responses(rollout: Rollout, tokenizer: PreTrainedTokenizerBase, most: int) -> list[dict[str, Any]]:
    """
    Return the first responses, at most so many, by token: `advantage` as the loss reads it, `value` V_old, `log_ratio`
    log π_old − log π_ref where both are known, `reward` r_t that the advantages are made of.
    """
    first = rollout.select(torch.arange(min(most, len(rollout)), device=rollout.mask.device))
    columns = {"advantage": first.advantages, "value": first.old_values}
    if first.old_logps is not None and first.ref_logps is not None:
        columns["log_ratio"] = first.old_logps - first.ref_logps
    columns["reward"] = first.rewards
    known = {name: column for name, column in columns.items() if column is not None}
    answers = []
    for row, real in enumerate(first.attended):
        answer = answer_with_credit(
            tokenizer,
            first.prompt_ids[row][first.prompt_mask[row]],
            first.response_ids[row][real],
            first.mask[row][real],
            {name: column[row][real] for name, column in known.items()},
            kind="response",
            score=first.scores[row].item() if first.scored[row] else None,
        )
        answers.append(answer)
    return answers
