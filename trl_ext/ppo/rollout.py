"""`Rollout`: the tensors of one rollout on one rank, with their shapes; `MicroBatch`: a part of it."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .rewards import last_token, paid_where_it_counts


@dataclass
class Rollout:
    """
    Prompts and their responses, with what the models say of them. B sequences, P prompt tokens (padded on the left), T
    response tokens (padded on the right), L = P + T, H the reference trunk's width. A tensor that a run does not read
    is `None`.

    Args:
        prompt_ids, prompt_mask: (B, P).
        response_ids: (B, T).
        attended: (B, T) bool, True at real tokens.
        mask: (B, T) bool, True at tokens that the actor chose and that count: no padding, no tool output, no sample
            without a score.
        scores: (B,) float, weighted sum over the reward sources; 0 where no source applies.
        scored: (B,) bool, False where every reward source returned `None`.
        has_eos: (B,) bool, True where the response ends with an end token.
        paid: (B, T) float, what the reward sources pay at each token, 0 where `mask` is False; the sum over a response
            is its score. `None`: all of it at the last token that counts.
        old_logps: (B, T) log-probabilities under the policy that sampled, nats.
        sampling_logps: (B, T) log-probabilities that vLLM sampled by, for `policy_objective="mask"`, nats; NaN where
            it gave none.
        ref_logps: (B, T) log-probabilities under the reference, nats.
        ref_states: (B, T, H) trunk states of the reference, for the exact KL.
        old_values: (B, T) state values before learning.
        rewards: (B, T) per-token rewards that the advantages are made of.
        advantages, returns: (B, T).
        importance_sampling_ratio: (B, T) or (B, 1), training over sampling probability, when vLLM samples.
        first_logps: (B, T) `old_logps` that are being collected in the first learning pass.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    attended: Tensor
    mask: Tensor
    scores: Tensor
    scored: Tensor
    has_eos: Tensor
    paid: Tensor | None = None
    old_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    ref_states: Tensor | None = None
    old_values: Tensor | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    importance_sampling_ratio: Tensor | None = None
    first_logps: Tensor | None = None

    @classmethod
    def from_ids(cls, prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, attended: Tensor) -> "Rollout":
        """Return responses without scores, for a pass that reads log-probabilities alone."""
        rows = response_ids.new_zeros(len(response_ids))
        return cls(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask.bool(),
            response_ids=response_ids,
            attended=attended,
            mask=attended,
            scores=rows.float(),
            scored=rows.bool(),
            has_eos=rows.bool(),
        )

    @classmethod
    def from_grpo(cls, batch: dict, scores: Tensor, end_ids: list[int], paid: Tensor | None = None) -> "Rollout":
        """
        Return the rollout that `GRPOTrainer._generate_and_score_completions` has made.

        Args:
            batch: GRPO's dictionary of tensors; `tool_mask` is 0 at tokens that a tool wrote.
            scores: (B,) float, NaN where every reward source returned `None`.
            end_ids: ids of the tokens that end a response.
            paid: (B, longest response) float, rewards at the tokens where the sources pay them.
        """
        ids, attended = batch["completion_ids"], batch["completion_mask"].bool()
        scored = ~scores.isnan()
        mask = attended & scored.unsqueeze(1)
        if "tool_mask" in batch:
            mask = mask & batch["tool_mask"].bool()
        is_end = torch.isin(ids, torch.tensor(end_ids, device=ids.device))
        if paid is not None:
            paid = paid_where_it_counts(nn.functional.pad(paid, (0, ids.size(1) - paid.size(1))), mask)
        return cls(
            prompt_ids=batch["prompt_ids"],
            prompt_mask=batch["prompt_mask"].bool(),
            response_ids=ids,
            attended=attended,
            mask=mask,
            scores=scores.nan_to_num(nan=0.0),
            scored=scored,
            has_eos=(is_end & last_token(attended)).any(dim=1),
            paid=paid,
            old_logps=batch.get("old_per_token_logps"),
            importance_sampling_ratio=batch.get("importance_sampling_ratio"),
        )

    def __len__(self) -> int:
        return self.response_ids.size(0)

    def select(self, rows: Tensor) -> "Rollout":
        """Return the sequences at the indices `rows`."""
        return Rollout(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are not `None`, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in values.items() if tensor is not None}

    def take_scores(self, scored: "Rollout") -> None:
        """Take what the models have said of the same responses before; `old_logps` that are there stay."""
        self.old_values, self.ref_logps, self.ref_states = scored.old_values, scored.ref_logps, scored.ref_states
        self.old_logps = scored.old_logps if self.old_logps is None else self.old_logps

    def keep_first_logps(self, rows: Tensor, logps: Tensor) -> None:
        """Keep the log-probabilities (b, T) that the first learning pass gives for the sequences at `rows`."""
        if self.first_logps is None:
            self.first_logps = logps.new_zeros(self.response_ids.shape)
        self.first_logps[rows] = logps

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of each prompt and of each response, (B,) each."""
        return self.prompt_mask.sum(1), self.attended.sum(1)

    def at_least(self, score: float) -> Tensor:
        """Return which responses were scored at least so high, (B,) bool."""
        return self.scored & (self.scores >= score)

    def groups(self) -> list[list[int]]:
        """Return the rows by their prompts: neighbours with the same one are a group."""
        same = (self.prompt_ids[1:] == self.prompt_ids[:-1]) & (self.prompt_mask[1:] == self.prompt_mask[:-1])
        groups = [[0]]
        for row, goes_on in enumerate(same.all(1).tolist(), start=1):
            if goes_on:
                groups[-1].append(row)
            else:
                groups.append([row])
        return groups

    def model_inputs(self) -> dict[str, Tensor]:
        """
        Return the inputs of a model's forward, (B, L) each: ids, attention mask, labels (−100 where the token does not
        count) and positions that count real tokens only.
        """
        attention_mask = torch.cat([self.prompt_mask, self.attended], dim=1)
        labels = torch.cat(
            [torch.full_like(self.prompt_ids, -100), self.response_ids.masked_fill(~self.mask, -100)], dim=1
        )
        return {
            "input_ids": torch.cat([self.prompt_ids, self.response_ids], dim=1),
            "attention_mask": attention_mask.long(),
            "labels": labels,
            "position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0),
        }


@dataclass
class MicroBatch:
    """
    The part of a rollout that one forward and backward pass learns from.

    Args:
        rollout: the whole rollout on this rank.
        rows: (b,) indices of the sequences of this micro-batch.
        num_tokens: tokens that count in the whole optimizer batch: all its micro-batches, all ranks.
        share: this micro-batch's share of the optimizer batch's sequences over all ranks, for a term that is a mean
            over micro-batches. 0: nothing counts; the pass is there because another rank has one more.
        num_positive: tokens that count of the responses with `positive_min_score`, in the whole optimizer batch.
        critic_alone: whether only the critic learns from it.
        scored_states: (N, H) of the actor's trunk at the N tokens that count, for a critic that is a head on it.
    """

    rollout: Rollout
    rows: Tensor
    num_tokens: float
    share: float
    num_positive: float = 0.0
    critic_alone: bool = False
    scored_states: Tensor | None = None

    def sequences(self) -> Rollout:
        """Return the sequences to learn from."""
        rollout = self.rollout.select(self.rows)
        if self.share == 0:
            rollout.mask = torch.zeros_like(rollout.mask)
        return rollout
