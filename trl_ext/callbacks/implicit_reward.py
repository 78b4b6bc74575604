"""`ImplicitRewardCallback`: show what a policy has learnt of single pairs, over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..dpo.implicit_reward import pair_logps
from ..dpo.losses import implicit_reward
from ..models.generation import evaluating
from .tables import ModelTable, Row, text_of, tokenizer_of


SIDES = ("chosen", "rejected")


class ImplicitRewardCallback(TrainerCallback):
    """
    Shows a table of pairs with the implicit rewards r = β log(π_θ / π_ref) of both completions, at the start, at every
    evaluation or every `every` steps, and at the end: on the terminal, and in `implicit_rewards/step_<step>.jsonl`,
    which the report shows. The reference is the model as it is when training starts, so no second model is held in
    memory. Works with any trainer of a causal language model: for PPO and GRPO it shows how their policy would order
    the pairs.

    Args:
        pairs: rows with `prompt`, `chosen` and `rejected`, text or conversation, such as the first few of a dataset;
            with `tools` and `chat_template_kwargs` where it has them.
        beta: the β of r. Unset: the trainer's `beta`.
        every: optimizer steps. Unset: at every evaluation.
        reference: another model, if training does not start from the reference.
        batch_size: sequences in a forward pass.

    Raises:
        ValueError: for rows without the three columns, or no β above 0 (when training starts, if it is the trainer's).
    """

    def __init__(
        self,
        pairs: Sequence[Mapping[str, Any]],
        beta: float | None = None,
        every: int | None = None,
        reference: Any = None,
        batch_size: int = 16,
    ):
        rows = [dict(row) for row in pairs]
        missing = sorted({name for row in rows for name in ("prompt", *SIDES) if name not in row})
        if not rows or missing:
            raise ValueError(
                f"`pairs` holds {len(rows)} rows without {missing or 'content'}; give rows with `prompt`, `chosen` "
                "and `rejected`. `trl.maybe_extract_prompt` finds the prompt where it is only the common beginning."
            )
        if beta is not None and not beta > 0:
            raise ValueError(f"`beta` is {beta}; it must be above 0.")
        if every is not None and every < 1:
            raise ValueError(f"`every` is {every}; it must be at least 1 step, or unset for every evaluation.")
        self.pairs, self.beta, self.every, self.batch_size = rows, beta, every, batch_size
        self._table = ModelTable(
            folder="implicit_rewards",
            title="implicit rewards, β · nats",
            shown=("prompt", *SIDES, "chosen_reward", "rejected_reward", "margin"),
            ask=self._logps,
            rows=self._rows,
            recall=self._recall,
            reference=reference,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.beta is None and not (getattr(args, "beta", None) or 0) > 0:
            raise ValueError(
                f"{type(args).__name__} has no `beta` above 0, so ImplicitRewardCallback needs one: `beta=0.1`, say."
            )
        self._table.begin(args, state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._table.again(args, state, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is None and state.global_step > 0:
            self._table.again(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._table.again(args, state, **kwargs)

    def _rows(self, args: Any, logps: Tensor, ref_logps: Tensor) -> list[Row]:
        rewards = implicit_reward(logps, ref_logps, self.beta or args.beta)
        columns = torch.cat([rewards, rewards[:1] - rewards[1:], ref_logps]).T.tolist()
        names = ("chosen_reward", "rejected_reward", "margin", *(f"{side}_ref_logp" for side in SIDES))
        return [
            {name: text_of(pair[name]) for name in ("prompt", *SIDES)} | dict(zip(names, numbers, strict=True))
            for pair, numbers in zip(self.pairs, columns, strict=True)
        ]

    def _recall(self, rows: list[Row]) -> Tensor | None:
        """Return the reference's log-probabilities from the first table, if it is of these pairs."""
        texts = [[text_of(pair[side]) for side in SIDES] for pair in self.pairs]
        if [[row[side] for side in SIDES] for row in rows] != texts:
            return None
        known = [[row[f"{side}_ref_logp"] for row in rows] for side in SIDES]
        return None if any(None in each for each in known) else torch.tensor(known)

    def _logps(self, model: Any, processing_class: Any) -> Tensor:
        """Return log-probabilities (2, pairs) of the chosen and of the rejected completions, nats per sequence."""
        with evaluating(model):
            return pair_logps(model, tokenizer_of(processing_class), self.pairs, self.batch_size)
