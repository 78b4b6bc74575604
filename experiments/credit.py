"""Where the credit of an answer belongs, and where a critic puts it: four tokens whose credit can be enumerated.

An answer is four tokens. Its score is ½ if the first two digits add up to 3, and 1 if the fourth then also repeats the
first; the third is idle. The policy is a tiny Llama that has read answers with a mean score of about ½. What its
answers score from any beginning on, V, is a sum over everything that may follow, so the credit of a token, its
advantage Q − V, is known: with one score at the end Q is V of the beginning that the token makes. PPO's critic sees
nothing but sampled answers with their scores, while the policy stays as it is (`critic_warmup_steps`).

    python experiments/credit.py    # about a minute on one CPU core; needs matplotlib
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.ppo.advantages import gae
from trl_ext.ppo.rollout import Rollout
from trl_ext.report.credit import draw_credit


VOCABULARY = ["<pad>", "<eos>", "?", "0", "1", "2", "3"]
EOS, QUESTION, ZERO = (VOCABULARY.index(token) for token in ("<eos>", "?", "0"))
LENGTH = 4

Answer = tuple[int, ...]
Policy = Callable[[Sequence[Answer]], Tensor]
"""From n beginnings of one length to the probabilities of what follows, (n, V)."""


def score(answer: Sequence[int]) -> float:
    """½ if the first two digits add up to 3, 1 if the fourth then also repeats the first; else 0."""
    digits = [token - ZERO for token in answer]
    if len(digits) < LENGTH or min(digits[0], digits[1]) < 0 or digits[0] + digits[1] != 3:
        return 0.0
    return 1.0 if digits[3] == digits[0] else 0.5


def has_ended(answer: Answer) -> bool:
    return len(answer) == LENGTH or EOS in answer


def enumerate_values(policy: Policy) -> dict[Answer, float]:
    """Return V of every beginning: the score of an answer that has ended, else the mean over all that may follow."""
    levels: list[list[Answer]] = [[()]]
    for _ in range(LENGTH):
        levels.append([(*one, token) for one in levels[-1] if not has_ended(one) for token in range(len(VOCABULARY))])
    values: dict[Answer, float] = {}
    for level in reversed(levels):
        values |= {one: score(one) for one in level if has_ended(one)}
        going_on = [one for one in level if not has_ended(one)]
        if going_on:
            for one, chances in zip(going_on, policy(going_on).tolist(), strict=True):
                values[one] = sum(chance * values[(*one, token)] for token, chance in enumerate(chances))
    return values


def exact_credit(values: dict[Answer, float], answer: Sequence[int]) -> list[float]:
    """Return Q − V of every token of an answer."""
    beginnings = [values[tuple(answer[:end])] for end in range(len(answer) + 1)]
    return [after - before for before, after in pairwise(beginnings)]


def policy_of(model: Any) -> Policy:
    """Return the policy that the trainer samples from: the model's own probabilities after the question."""

    @torch.no_grad()
    def policy(beginnings: Sequence[Answer]) -> Tensor:
        ids = torch.tensor([[QUESTION, *one] for one in beginnings])
        return model(input_ids=ids).logits[:, -1].double().softmax(-1)

    return policy


def noisy_answers(count: int, generator: torch.Generator) -> Tensor:
    """Return answers (count, 4) of digits, of which the second and the fourth are each right more often than not."""
    digits = torch.randint(0, 4, (count, LENGTH), generator=generator)
    knows = torch.rand(count, 2, generator=generator) < 0.5
    digits[:, 1] = torch.where(knows[:, 0], 3 - digits[:, 0], digits[:, 1])
    digits[:, 3] = torch.where(knows[:, 1], digits[:, 0], digits[:, 3])
    return digits + ZERO


def imitating_actor(steps: int = 300) -> LlamaForCausalLM:
    """Return an actor that has learnt to answer like `noisy_answers`."""
    ids = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": EOS}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=16, **sizes, **ids))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        answers = noisy_answers(128, generator)
        rows = torch.cat([torch.full((128, 1), QUESTION), answers], dim=1)
        logits = model(input_ids=rows).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="?")


def train_critic(actor: LlamaForCausalLM, rollouts: int, folder: str) -> Rollout:
    """Train the critic of a policy that stays as it is, and return a rollout that it has not learned from."""
    batch = 256
    args = PPOConfigX(
        output_dir=folder,
        per_device_train_batch_size=batch // 4,
        gradient_accumulation_steps=4,
        max_steps=8 * rollouts,
        num_ppo_epochs=2,
        num_mini_batches=4,
        critic_warmup_steps=8 * rollouts,
        critic_learning_rate=2e-3,
        critic_lam=1.0,
        kl_coef=0.0,
        ent_coef=0.0,
        cliprange_value=None,
        response_length=LENGTH,
        local_rollout_forward_batch_size=batch,
        lr_scheduler_type="linear",
        gradient_checkpointing=False,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainerX(
        args,
        processing_class=tokenizer(),
        model=actor,
        reward_funcs=lambda completion_ids, **_: [score(ids) for ids in completion_ids],
        train_dataset=Dataset.from_dict({"prompt": ["?"] * batch}),
    )
    trainer.train()
    return trainer.run_state.rollout  # its values are from before the critic's last steps


def advantages_of(rollout: Rollout, values: dict[Answer, float]) -> dict[str, Tensor]:
    """Return (B, T) advantages of every token by their name: enumerated, the critic's, and without a critic."""
    exact = torch.zeros_like(rollout.rewards)
    for row, (ids, real) in enumerate(zip(rollout.response_ids, rollout.attended, strict=True)):
        exact[row, : int(real.sum())] = torch.tensor(exact_credit(values, ids[real].tolist()))
    critic = {
        f"critic, λ = {lam:g}": gae(rollout.rewards, rollout.old_values, rollout.mask, 1.0, lam)
        for lam in (0.0, 0.95, 1.0)
    }
    centred = (rollout.scores - rollout.scores.mean())[:, None] * rollout.mask
    return {"enumerated": exact, **critic, "no critic": centred}


def table(advantages: dict[str, Tensor], mask: Tensor) -> str:
    """A Markdown table of how far every estimate is from what is enumerated, over all tokens."""
    exact = advantages["enumerated"][mask]
    lines = ["| advantages | correlation with the enumerated | mean absolute error |", "|---|---:|---:|"]
    for name, column in advantages.items():
        if name != "enumerated":
            estimate = column[mask]
            correlation = torch.corrcoef(torch.stack([exact, estimate]))[0, 1]
            lines.append(f"| {name} | {correlation:.3f} | {(estimate - exact).abs().mean():.3f} |")
    return "\n".join(lines)


def shown_answers(rollout: Rollout, advantages: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return an answer of each kind, by token: all of it right, the sum only, the repeat only, neither."""
    answers: dict[tuple[bool, bool], dict[str, Any]] = {}
    for row, ids in enumerate(rollout.response_ids.tolist()):
        if min(ids) >= ZERO:
            kind = (ids[0] + ids[1] - 2 * ZERO == 3, ids[3] == ids[0])
            pieces = [
                {"text": VOCABULARY[token]} | {name: [column[row, t].item()] for name, column in advantages.items()}
                for t, token in enumerate(ids)
            ]
            answers.setdefault(kind, {"pieces": pieces})
    return [answers[kind] for kind in sorted(answers, reverse=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=100, help="of 256 answers each (default 100)")
    parser.add_argument("--output", type=Path, default=Path("docs/images/credit.png"), help="the picture")
    args = parser.parse_args(argv)
    set_seed(0)
    actor = imitating_actor()
    values = enumerate_values(policy_of(actor))
    with tempfile.TemporaryDirectory() as folder:
        rollout = train_critic(actor, args.rollouts, folder)
    advantages = advantages_of(rollout, values)
    print(f"{args.rollouts} rollouts; V before the first token is {values[()]:.3f}\n")
    print(table(advantages, rollout.mask))
    names = {name: name for name in advantages if name != "critic, λ = 1"}
    draw_credit(shown_answers(rollout, advantages), names).savefig(args.output, dpi=120)


if __name__ == "__main__":
    main()
