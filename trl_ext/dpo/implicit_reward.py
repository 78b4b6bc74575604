"""`ImplicitReward`: a policy trained by DPO as a reward function."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_peft_model, tqdm
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOTrainer

from .._trl import tokenised_pair, use_adapter
from ..data.rendering import check_text
from ..models.loading import base_of, check_known, known_tokens, refuse_encoder_decoder, refuse_scoring
from ..models.probe import in_mode, probe_rows, require_causal, tolerance
from ..models.sharding import is_partitioned
from .guards import check_vocabularies
from .losses import implicit_reward


Text = str | list[dict[str, Any]]
Cut = tuple[list[int], int]  # ids of prompt and completion, and how many belong to the prompt

READ_BY_TEMPLATES = ("tools", "chat_template_kwargs")
AS_IT_IS = SimpleNamespace(max_length=None, truncation_mode="keep_start", dataset_num_proc=None)


class ImplicitReward:
    """
    r(x, y) = β log(π_θ(y|x) / π_ref(y|x)), in nats times β (Rafailov et al. 2023 eq. 5): what DPO has learnt
    of people's preferences, up to a constant per prompt. Takes and gives what a TRL reward function does, so that
    `PPOTrainerX(reward_funcs=ImplicitReward(...))` works; also ranks answers and scores pairs. Prompts and completions
    are read whole: a run whose `max_length` cuts them logs the rewards of what is left.

    Args:
        policy: the trained model, or a `PeftModel`.
        reference: what it started from; `None` for a `PeftModel`: itself without its adapter (or with its adapter
            "ref", where it has one).
        tokenizer: of both models; its chat template renders conversations.
        beta: the β of the training.
        batch_size: sequences in a forward pass.
        shows_progress: show bars of the batches read by policy and reference.

    Raises:
        ValueError: for no reference, one with another vocabulary, a reward model read as a language model, a model
            that reads what follows a token, or a β that is not above 0; when it is asked, for a log-probability that
            is not finite, and for a prompt that would begin with BOS twice.
    """

    __name__ = "implicit_reward"

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | PeftModel | None,
        tokenizer: PreTrainedTokenizerBase,
        beta: float = 0.1,
        batch_size: int = 16,
        shows_progress: bool = False,
    ):
        if not beta > 0:
            raise ValueError(f"`beta` is {beta}; give the β > 0 that the policy was trained with.")
        if batch_size < 1:
            raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
        if reference is None and not is_peft_model(policy):
            raise ValueError(
                "`reference` is None and the policy has no adapter to switch off: give the model that DPO started "
                "from."
            )
        for model in (policy, reference):
            if model is not None:
                refuse_encoder_decoder(model.config, type(model).__name__)
                refuse_scoring(model.config, f"The folder of a {type(model).__name__}")
        if reference is not None:
            check_vocabularies(policy.config.get_text_config(), reference.config.get_text_config(), "reference")
            _require_causal(reference)
        _require_causal(policy)
        self.policy = policy.eval()
        self.reference = None if reference is None else reference.eval()
        self.tokenizer = tokenizer
        self.beta = beta
        self.batch_size = batch_size
        self.shows_progress = shows_progress

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Return a reward for each completion; `tools` and `chat_template_kwargs`, by row, are read as in training."""
        rows = zip(prompts, completions, completions, _rows_of(columns, len(prompts)), strict=True)
        return self._rewards([_tokenise(self.tokenizer, *row) for row in rows])

    def of_pairs(
        self, prompts: Sequence[Text], chosen: Sequence[Text], rejected: Sequence[Text], **columns: Any
    ) -> tuple[list[float], list[float]]:
        """
        Return the rewards of the chosen and of the rejected completions, cut from their prompt as in training: where a
        token reaches over the end of the prompt in one of the two, both begin before it.
        """
        rows = list(zip(prompts, chosen, rejected, _rows_of(columns, len(prompts)), strict=True))
        sequences = [_tokenise(self.tokenizer, prompt, good, bad, other) for prompt, good, bad, other in rows]
        sequences += [_tokenise(self.tokenizer, prompt, bad, good, other) for prompt, good, bad, other in rows]
        rewards = self._rewards(sequences)
        return rewards[: len(rows)], rewards[len(rows) :]

    def rank(self, prompt: Text, completions: Sequence[Text]) -> list[int]:
        """Return the indices of the completions, the best first; all are cut where one first leaves the prompt."""
        cuts = [_tokenise(self.tokenizer, prompt, completion)[1] for completion in completions]
        first = completions[cuts.index(min(cuts))]
        rewards = self._rewards([_tokenise(self.tokenizer, prompt, completion, first) for completion in completions])
        return sorted(range(len(rewards)), key=lambda i: -rewards[i])

    def _rewards(self, sequences: Sequence[Cut]) -> list[float]:
        how = (self.tokenizer, sequences, self.batch_size)
        names = ("policy", "reference") if self.shows_progress else (None, None)
        logps = completion_logps(self.policy, *how, names[0])
        if self.reference is not None:
            ref_logps = completion_logps(self.reference, *how, names[1])
        else:
            adapters: Any = self.policy.peft_config
            with use_adapter(self.policy, "ref" if "ref" in adapters else None):
                ref_logps = completion_logps(self.policy, *how, names[1])
        _require_finite("policy", logps, sequences, self.tokenizer)
        _require_finite("reference", ref_logps, sequences, self.tokenizer)
        return implicit_reward(logps, ref_logps, self.beta).tolist()


def pair_logps(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Mapping[str, Any]], batch_size: int = 16
) -> Tensor:
    """
    Return log π (2, pairs) of the chosen and of the rejected completions, on the CPU, nats per sequence. `pairs` are
    rows with `prompt`, `chosen`, `rejected` and, for conversations, `tools` and `chat_template_kwargs`.
    """
    sides = (("chosen", "rejected"), ("rejected", "chosen"))
    sequences = [_tokenise(tokenizer, row["prompt"], row[one], row[two], row) for one, two in sides for row in pairs]
    return completion_logps(model, tokenizer, sequences, batch_size).view(2, -1)


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Cut],
    batch_size: int = 16,
    shown_as: str | None = None,
) -> Tensor:
    """
    Return log π(completion | prompt), (N,) on the CPU, in nats, summed over a completion's tokens; show the progress
    under the name `shown_as`, if given.
    """
    ids, known = chain.from_iterable(ids for ids, _ in sequences), known_tokens(model, getattr(model, "config", None))
    check_known(ids, known, tokenizer, f"The {type(model).__name__}", "a prompt with its completion")
    parts = [sequences[start : start + batch_size] for start in range(0, len(sequences), batch_size)]
    shown = tqdm(parts, desc=shown_as, unit="batch", disable=shown_as is None)
    return torch.cat([torch.zeros(0), *(_logps_of_batch(model, part) for part in shown)])


def _require_finite(name: str, logps: Tensor, sequences: Sequence[Cut], tokenizer: PreTrainedTokenizerBase) -> None:
    broken = (~logps.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"The {name} gives {len(broken)} of {len(logps)} answers a log-probability that is not finite, the first "
            f"being {logps[broken[0]].item()} of {tokenizer.decode(sequences[broken[0]][0])!r:.200}. Look at its "
            "weights, and at the dtype that it is loaded in."
        )


def _rows_of(columns: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """Return, row by row, the columns of a reward function that a chat template reads."""
    read = {name: columns[name] for name in READ_BY_TEMPLATES if columns.get(name) is not None}
    return [{name: values[i] for name, values in read.items()} for i in range(count)]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    other: Text | None = None,
    columns: Mapping[str, Any] | None = None,
) -> Cut:
    """
    Return the ids of prompt and completion, and how many belong to the prompt, as `trl.DPOTrainer` makes them of a
    row: where the prompt ends depends on the pair's other completion too.
    """
    if isinstance(prompt, str):
        check_text(prompt, "a row", tokenizer)
    row: dict[str, Any] = {"prompt": prompt, "chosen": completion, "rejected": completion if other is None else other}
    row |= {name: columns[name] for name in READ_BY_TEMPLATES if columns is not None and columns.get(name) is not None}
    ids = tokenised_pair(DPOTrainer, row, tokenizer, AS_IT_IS)
    return ids["prompt_ids"] + ids["chosen_ids"], len(ids["prompt_ids"])


def _logps_of_batch(model: Any, rows: Sequence[Cut]) -> Tensor:
    sequences = [torch.tensor(ids) for ids, _ in rows]
    starts = torch.tensor([start for _, start in rows])
    device = next(model.parameters()).device
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)  # a masked token may be any, so 0 will do
    ids, mask = pad(sequences).to(device), pad([torch.ones_like(row) for row in sequences]).to(device)
    first = max(int(starts.min()), 1)  # the first token of which a probability is read
    kept = ids.size(1) - first + 1
    # Some families give all logits whatever is asked (TrOCR), and some forwards cannot be asked.
    base = base_of(model)
    asked = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **asked).logits[:, -kept:-1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, first:, None]).squeeze(-1)
    position = torch.arange(first, ids.size(1), device=device)
    read = (position >= starts.to(device).unsqueeze(1)) & mask[:, first:].bool()
    return (logps * read).sum(dim=1).cpu()


@torch.no_grad()
def _require_causal(model: Any) -> None:
    """Raise `ValueError` for a model that reads the tokens that follow, as the trainers do."""
    base = base_of(model)
    if is_partitioned(base):
        return
    row = probe_rows(base)[0]

    def logps(row: Tensor) -> Tensor:
        return base(input_ids=row, use_cache=False).logits[0].float().log_softmax(-1)

    with in_mode(base, training=False):
        try:
            allowed = tolerance(base, lambda: logps(row))
        except Exception:  # a model that cannot read a few tokens will say so itself
            return
        if logps(row).isfinite().all():  # what is not is reported where it is asked
            require_causal(type(base).__name__, logps, row, allowed, "score")
