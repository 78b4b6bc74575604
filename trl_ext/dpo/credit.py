"""The tokens of pairs with their implicit rewards, for callbacks and the report."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..runs.credit import answer_with_credit


@dataclass
class ScoredPairs:
    """
    A batch of B pairs, the chosen sequences before the rejected.

    Args:
        ids, attended, completion: (2B, L) token ids, and masks of real tokens and of the completions.
        logratios: (2B, L − 1) log π_θ − log π_ref of every token but the first, in nats.
    """

    ids: Tensor
    attended: Tensor
    completion: Tensor
    logratios: Tensor

    @classmethod
    def of_batch(cls, inputs: dict[str, Tensor], logps: Tensor, ref_logps: Tensor) -> "ScoredPairs":
        """Return a batch of TRL's with what both models say of its tokens, without a prompt's virtual ones."""
        ids = inputs["input_ids"]
        logps, ref_logps = (each.detach()[:, 1 - ids.size(1) :] for each in (logps, ref_logps))
        return cls(ids, inputs["attention_mask"], inputs["completion_mask"], logps - ref_logps)


def credit_of_pairs(
    batch: ScoredPairs, tokenizer: PreTrainedTokenizerBase, beta: float, most: int
) -> list[dict[str, Any]]:
    """
    Return both completions of the first pairs, at most so many, by token: `implicit_reward` is β · (log π_θ − log
    π_ref), and the score of a completion their sum.
    """
    pairs = len(batch.ids) // 2
    answers = []
    for row in (row for pair in range(min(most, pairs)) for row in (pair, pairs + pair)):
        scored = batch.completion[row].bool()
        scored[0] = False  # nothing precedes the first token, so it has no probability
        answer = batch.ids[row][scored]
        rewards = beta * batch.logratios[row][scored[1:]].float()
        answers.append(
            answer_with_credit(
                tokenizer,
                batch.ids[row][batch.attended[row].bool() & ~scored],
                answer,
                answer.new_ones(len(answer)).bool(),
                {"implicit_reward": rewards},
                kind="chosen" if row < pairs else "rejected",
                score=rewards.sum().item(),
            )
        )
    return answers
