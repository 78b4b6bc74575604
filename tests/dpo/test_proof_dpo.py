"""
Closed form: with preferences drawn from a known reward by Bradley-Terry, DPO ends at π* ∝ π_ref · exp(r / β), to
within 0.01 nats of KL(π_θ ‖ π*), and `ImplicitReward` gives the reward back, up to a constant per prompt.

Two prompts, answers of one token, a table of rewards over the vocabulary of 12, and the real trainer with shared
prefixes. Where something else is asked for, the run must end elsewhere. `make proof` prints every distance.
"""

import time
from unittest import mock

import pytest
import torch
from datasets import Dataset

import dpo_runs
import tiny
from trl_ext import ImplicitReward


BOUND = 0.01  # nats
ACTIONS = 12
COPIES = 24  # of every two answers, in one order or the other
PROMPTS = ["zero one", "two three four"]
REWARDS = 3 * torch.rand(2, ACTIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1.5


def tokenizer():
    """Renders a conversation as its words, without an end: an answer is one token, whichever of the vocabulary."""
    words = tiny.tiny_tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return words


def preferences(seed: int) -> Dataset:
    """Systematic draws: a wins floor(COPIES · σ(r_a − r_b) + u), so shares are Bradley-Terry's with little noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for text, rewards in zip(PROMPTS, REWARDS, strict=True):
        for a in range(ACTIONS):
            for b in range(a):
                share = torch.sigmoid(rewards[a] - rewards[b]).item()
                wins = int(COPIES * share + torch.rand(1, generator=generator).item())
                for i in range(COPIES):
                    chosen, rejected = (a, b) if i < wins else (b, a)
                    rows.append(dpo_runs.chat(text, tiny.VOCABULARY[chosen], tiny.VOCABULARY[rejected]))
    return Dataset.from_list(rows)


@torch.no_grad()
def action_logps(model):
    """log π(·|x) of each prompt, (2, V)."""
    ids = [torch.tensor([tokenizer()(text)["input_ids"]]) for text in PROMPTS]
    return torch.stack([model(input_ids=prompt).logits[0, -1].double().log_softmax(0) for prompt in ids])


def kl(p, q):
    """KL(p ‖ q) of each prompt, in nats; the largest."""
    return (p.exp() * (p - q)).sum(1).max().item()


class Outcome:
    """A trained policy, where it started, and the time it took."""

    def __init__(self, tmp_path, beta, seed, epochs, **options):
        settings = {
            "beta": beta,
            "seed": seed,
            "per_device_train_batch_size": 66,
            "max_steps": -1,
            "num_train_epochs": epochs,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "lr_scheduler_type": "linear",
            "logging_strategy": "no",
        }
        models = {
            "model": dpo_runs.tiny_model(seed=seed, vocab_size=ACTIONS),
            "ref_model": dpo_runs.tiny_model(seed=seed, vocab_size=ACTIONS),
            "processing_class": tokenizer(),
            "train_dataset": preferences(seed),
        }
        self.beta = beta
        with mock.patch("trl_ext.data.pairs.check_pairs"):  # special tokens are answers here, like any other
            trainer = dpo_runs.dpo_trainer(tmp_path, models, **(settings | options))
        assert trainer._forwards[0].packing.on
        start = time.perf_counter()
        trainer.train()
        self.seconds = time.perf_counter() - start
        self.model, self.start = trainer.model.eval(), dpo_runs.tiny_model(seed=seed, vocab_size=ACTIONS)
        self.policy, self.reference = action_logps(self.model), action_logps(self.start)

    def optimum(self, beta):
        """log π*, π* ∝ π_ref · exp(r / β)."""
        return (self.reference + REWARDS / beta).log_softmax(1)

    def report(self, what):
        """Prints (`pytest -s`) and returns KL(π_θ ‖ π*)."""
        target = self.optimum(self.beta)
        distance = kl(self.policy, target)
        print(f"{what}: {kl(self.reference, target):.3f} -> {distance:.5f} nats in {self.seconds:.1f} s")
        return distance


def implicit_rewards(outcome):
    """What `ImplicitReward` says of every answer to each prompt, (2, V), without its mean."""
    score = ImplicitReward(outcome.model, outcome.start, tokenizer(), outcome.beta)
    answers = [dpo_runs.said("assistant", word) for word in tiny.VOCABULARY[:ACTIONS]]
    rewards = torch.tensor([score([dpo_runs.said("user", text)] * ACTIONS, answers) for text in PROMPTS])
    return rewards.double() - rewards.double().mean(1, keepdim=True)


@pytest.mark.parametrize(
    "seed", [pytest.param(0, marks=pytest.mark.proof), pytest.param(1, marks=pytest.mark.measure)]
)
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_dpo_ends_at_the_closed_form_and_gives_the_reward_back(tmp_path, beta, seed):
    outcome = Outcome(tmp_path, beta, seed, epochs=5)
    assert kl(outcome.reference, outcome.optimum(beta)) > 0.2, "the reference is so close that nothing was learned"
    assert outcome.report(f"β = {beta}, seed {seed}") < BOUND
    for other in (beta / 1.5, beta * 1.5):
        assert kl(outcome.policy, outcome.optimum(other)) > 2 * BOUND, "the bound does not tell one β from another"
    error = (implicit_rewards(outcome) - (REWARDS - REWARDS.mean(1, keepdim=True))).abs()
    print(f"implicit reward: off by {error.mean():.3f} on average, {error.max():.3f} at most")
    assert error.mean() < 0.1
    assert error.max() < 0.25


@pytest.mark.proof
def test_control_smoothed_labels_end_elsewhere(tmp_path):
    """At log-odds of (1 − 2ε) p + ε instead of p: the rewards shrink."""
    assert Outcome(tmp_path, 0.5, 0, epochs=1, label_smoothing=0.2).report("label smoothing 0.2") > 5 * BOUND
