"""`ImplicitReward`: a policy trained by DPO as a reward function."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import maybe_apply_chat_template

from .._trl import use_adapter
from .checks import check_vocabularies
from .losses import implicit_reward


Text = str | list[dict[str, Any]]


class ImplicitReward:
    """
    r(x, y) = β log(π_θ(y|x) / π_ref(y|x)), in nats times β (Rafailov et al. 2023 eq. 5; S0, S3): what DPO has learnt
    of people's preferences, up to a constant per prompt. Takes and gives what a TRL reward function does, so that
    `PPOTrainerX(reward_funcs=ImplicitReward(...))` works; also ranks answers and scores pairs.

    Args:
        policy: the trained model, or a `PeftModel`.
        reference: what it started from; `None` for a `PeftModel`: itself without its adapter (or with its adapter
            "ref", where it has one).
        tokenizer: of both models; its chat template renders conversations.
        beta: the β of the training.
        batch_size: sequences in a forward pass.

    Raises:
        ValueError: for no reference, one with another vocabulary, or a β that is not above 0.
    """

    __name__ = "implicit_reward"

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        reference: PreTrainedModel | PeftModel | None,
        tokenizer: PreTrainedTokenizerBase,
        beta: float = 0.1,
        batch_size: int = 16,
    ):
        if not beta > 0:
            raise ValueError(f"`beta` is {beta}; give the β > 0 that the policy was trained with.")
        if reference is None and not is_peft_model(policy):
            raise ValueError(
                "`reference` is None and the policy has no adapter to switch off: give the model DPO started from."
            )
        if reference is not None:
            check_vocabularies(policy.config.get_text_config(), reference.config.get_text_config(), "reference")
        self.policy = policy.eval()
        self.reference = None if reference is None else reference.eval()
        self.tokenizer = tokenizer
        self.beta = beta
        self.batch_size = batch_size

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **kwargs: Any) -> list[float]:
        """A reward for each completion, text or conversation."""
        logps = self._logps(self.policy, prompts, completions)
        if self.reference is not None:
            ref_logps = self._logps(self.reference, prompts, completions)
        else:
            adapters: Any = self.policy.peft_config
            with use_adapter(self.policy, "ref" if "ref" in adapters else None):
                ref_logps = self._logps(self.policy, prompts, completions)
        return implicit_reward(logps, ref_logps, self.beta).tolist()

    def rank(self, prompt: Text, completions: Sequence[Text]) -> list[int]:
        """The indices of the completions, the best first."""
        rewards = self([prompt] * len(completions), completions)
        return sorted(range(len(rewards)), key=lambda i: -rewards[i])

    def _logps(self, model: nn.Module, prompts: Sequence[Text], completions: Sequence[Text]) -> Tensor:
        return completion_logps(model, self.tokenizer, prompts, completions, self.batch_size)


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    batch_size: int = 16,
) -> Tensor:
    """log π(completion | prompt), (N,) on the CPU, nats: summed over a completion's tokens, as in DPO's training."""
    rows = [_tokenise(tokenizer, *row) for row in zip(prompts, completions, strict=True)]
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return torch.cat([torch.zeros(0), *(_logps_of_batch(model, part) for part in parts)])


def _tokenise(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> tuple[list[int], int]:
    """The ids of prompt and completion, and how many belong to the prompt, as in DPO's training."""
    row = maybe_apply_chat_template({"prompt": prompt, "completion": completion}, tokenizer)
    whole = row["prompt"] + row["completion"]
    if isinstance(prompt, str) and tokenizer.eos_token and not whole.endswith(tokenizer.eos_token):
        whole += tokenizer.eos_token
    ids, of_prompt = (tokenizer(text)["input_ids"] for text in (whole, row["prompt"]))
    common = next((i for i, (a, b) in enumerate(zip(ids, of_prompt, strict=False)) if a != b), len(of_prompt))
    return ids, min(common, len(ids) - 1)


def _logps_of_batch(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    sequences = [torch.tensor(ids) for ids, _ in rows]
    starts = torch.tensor([start for _, start in rows])
    device = next(model.parameters()).device
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)  # a masked token may be any, so 0 will do
    ids, mask = pad(sequences).to(device), pad([torch.ones_like(row) for row in sequences]).to(device)
    first = max(int(starts.min()), 1)  # the first token of which a probability is read
    kept = ids.size(1) - first + 1
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits[:, :-1]
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, first:, None]).squeeze(-1)
    position = torch.arange(first, ids.size(1), device=device)
    read = (position >= starts.to(device).unsqueeze(1)) & mask[:, first:].bool()
    return (logps * read).sum(dim=1).cpu()
