"""`ImplicitRewardCallback`: what a policy has learnt of single pairs, over time."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..dpo.implicit_reward import completion_logps
from ..dpo.losses import implicit_reward
from .tables import (
    evaluating,
    read_table,
    show_table,
    table_path,
    takes_part,
    text_of,
    tokenizer_of,
    write_table,
)


FOLDER = "implicit_rewards"
SIDES = ("chosen", "rejected")


class ImplicitRewardCallback(TrainerCallback):
    """
    A table of pairs with the implicit rewards r = β log(π_θ / π_ref) of both completions, at the start, at every
    evaluation or every `every` steps, and at the end: on the terminal, and in `implicit_rewards/step_<step>.jsonl`,
    which the report shows. The log has means over many pairs; this says which pair has learnt what. The reference is
    the model as it is when training starts, which is DPO's own, so no second model is held in memory.

    For any trainer of a causal language model: of PPO and GRPO it says how their policy would order the pairs.

    Args:
        pairs: rows with `prompt`, `chosen` and `rejected`, text or conversation, such as the first few of a dataset.
        beta: the β of r. Unset: the trainer's `beta`.
        every: optimizer steps. Unset: at every evaluation.
        reference: another model, where training does not start from the reference.
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
        self.rows = rows
        self.beta = beta
        self.every = every
        self.reference = reference
        self.batch_size = batch_size
        self._ref_logps = torch.zeros(2, len(rows))
        self._shown_at = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.beta is None and not (getattr(args, "beta", None) or 0) > 0:
            raise ValueError(
                f"{type(args).__name__} has no `beta` above 0, so ImplicitRewardCallback needs one: `beta=0.1`, say."
            )
        if not takes_part(args, state):
            return
        first = read_table(table_path(args.output_dir, FOLDER, 0)) if state.global_step else []
        if [(row["chosen"], row["rejected"]) for row in first] == [
            tuple(map(text_of, self._texts(r))) for r in self.rows
        ]:
            self._ref_logps = torch.tensor([[row[f"{side}_ref_logp"] for row in first] for side in SIDES])  # resumed
        else:
            self._ref_logps = self._logps(self.reference or model, kwargs["processing_class"])
        if state.global_step == 0:
            self._write(args, state, self._logps(model, kwargs["processing_class"]), show=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._score(args, state, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every is None and state.global_step > 0:
            self._score(args, state, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._score(args, state, **kwargs)

    def _score(self, args: Any, state: Any, model: Any = None, processing_class: Any = None, **kwargs: Any) -> None:
        if takes_part(args, state) and self._shown_at != state.global_step:
            self._write(args, state, self._logps(model, processing_class), show=True)
            self._shown_at = state.global_step

    def _write(self, args: Any, state: Any, logps: Tensor, show: bool) -> None:
        if not state.is_world_process_zero:
            return
        chosen, rejected = implicit_reward(logps, self._ref_logps, self.beta or args.beta).tolist()
        rows = [
            {"prompt": text_of(row["prompt"]), "chosen": text_of(row["chosen"]), "rejected": text_of(row["rejected"])}
            | {"chosen_reward": chosen[i], "rejected_reward": rejected[i], "margin": chosen[i] - rejected[i]}
            for i, row in enumerate(self.rows)
        ]
        if show:
            show_table(f"Step {state.global_step}: implicit rewards, β · nats", rows)
        of_reference = [
            {f"{side}_ref_logp": value for side, value in zip(SIDES, values, strict=True)}
            for values in self._ref_logps.T.tolist()
        ]
        path = table_path(args.output_dir, FOLDER, state.global_step)
        write_table(path, [row | other for row, other in zip(rows, of_reference, strict=True)])

    def _logps(self, model: Any, processing_class: Any) -> Tensor:
        """(2, pairs): log-probabilities of the chosen and of the rejected completions, nats per sequence."""
        tokenizer, prompts = tokenizer_of(processing_class), [row["prompt"] for row in self.rows]
        with evaluating(model):
            sides = [
                completion_logps(model, tokenizer, prompts, [row[side] for row in self.rows], self.batch_size)
                for side in SIDES
            ]
        return torch.stack(sides)

    @staticmethod
    def _texts(row: Mapping[str, Any]) -> list[Any]:
        return [row[side] for side in SIDES]
