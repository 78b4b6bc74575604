"""Closed form: on a bandit, PPO ends at π* ∝ π_ref · exp(r / β), to within 0.01 nats of KL(π_θ ‖ π*).

One prompt, answers of one token, a table of rewards over the whole vocabulary, and the real trainer. π* maximises
E_π[r] − β KL(π ‖ π_ref), which the KL in the loss and the KL in the reward both ask for. Where something else is asked
for, the run must end elsewhere, and each control says where. `make proof` prints every distance.
"""

import time
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from torch import Tensor

import tiny
from trl_ext import PPOConfigX, PPOTrainerX


PROMPT = "the cat"
REWARDS = 3 * torch.rand(len(tiny.VOCABULARY), generator=torch.Generator().manual_seed(3), dtype=torch.float64) - 1.5
BOUND = 0.01  # nats

KL_IN_LOSS = {"kl_placement": "loss", "kl_estimator": "k2"}
EXACT_KL_IN_LOSS = {"kl_placement": "loss", "kl_estimator": "full"}
KL_IN_REWARD = {"kl_placement": "reward"}

LONG = {"samples": 512, "rollouts": 60, "learning_rate": 1e-2}
# Near π* the noise of k2 cancels that of the reward, token by token; beside the exact KL the reward's noise remains,
# and takes more samples and smaller steps to average out.
LONG_EXACT = {"samples": 1024, "rollouts": 60, "learning_rate": 5e-3}
SHORT = {"samples": 256, "rollouts": 30, "learning_rate": 2e-2}


class Outcome(NamedTuple):
    """Log-probabilities and rewards of all actions, (V,) in float64, and the wall time of the run."""

    policy: Tensor
    reference: Tensor
    rewards: Tensor
    seconds: float

    def optimum(self, beta: float) -> Tensor:
        """log π*, π* ∝ π_ref · exp(r / β)."""
        return (self.reference + self.rewards / beta).log_softmax(0)


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) in nats, from log-probabilities."""
    return (p.exp() * (p - q)).sum().item()


@torch.no_grad()
def action_logps(model, tokenizer) -> Tensor:
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    return model(input_ids=prompt).logits[0, -1].double().log_softmax(0)


def train(
    tmp_path, beta, seed, *, samples: int, rollouts: int, learning_rate: float, scale: float = 1.0, **options
) -> Outcome:
    """Trains in two epochs of two mini-batches per rollout. The seed decides the actor and the sampling."""
    rewards = scale * REWARDS

    def table(completion_ids, **_):
        return [rewards[action].item() for (action,) in completion_ids]

    settings = {
        "output_dir": str(tmp_path),
        "seed": seed,
        "per_device_train_batch_size": samples,
        "gradient_accumulation_steps": 1,
        "total_episodes": samples * rollouts,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "local_rollout_forward_batch_size": samples,
        "gradient_checkpointing": False,
        "response_length": 1,
        "kl_coef": beta,
        "gamma": 1.0,
        "lam": 1.0,
        "ent_coef": 0.0,
        "cliprange_value": None,
        "whiten_advantages": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    actor, tokenizer = tiny.tiny_actor(seed), tiny.tiny_tokenizer()
    actor.generation_config.update(do_sample=True, min_p=0.5, typical_p=0.5, suppress_tokens=[20, 30])  # not PPO's
    reference = action_logps(actor, tokenizer)
    trainer = PPOTrainerX(
        PPOConfigX(**(settings | options)),
        tokenizer,
        actor,
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * samples}),
        reward_funcs=table,
    )
    start = time.perf_counter()
    trainer.train()
    return Outcome(action_logps(trainer.model, tokenizer), reference, rewards, time.perf_counter() - start)


def report(what: str, outcome: Outcome, target: Tensor) -> float:
    """Prints (`pytest -s`) and returns KL(π_θ ‖ target)."""
    distance = kl(outcome.policy, target)
    print(f"{what}: {kl(outcome.reference, target):.3f} -> {distance:.5f} nats in {outcome.seconds:.1f} s")
    return distance


def assert_ends_at_optimum(outcome: Outcome, beta: float, what: str) -> None:
    assert kl(outcome.reference, outcome.optimum(beta)) > 0.2, "the reference is so close that nothing was learned"
    assert report(what, outcome, outcome.optimum(beta)) < BOUND
    for other in (beta / 1.5, beta * 1.5):
        assert kl(outcome.policy, outcome.optimum(other)) > 2 * BOUND, "the bound does not tell one β from another"


@pytest.mark.integration
def test_bandit_ends_at_the_closed_form(tmp_path):
    outcome = train(tmp_path, beta=1.0, seed=0, **SHORT, **KL_IN_LOSS, critic="head")
    assert_ends_at_optimum(outcome, 1.0, "a short run")


@pytest.mark.parametrize(
    "beta, seed",
    [
        pytest.param(0.5, 0, marks=pytest.mark.proof),
        *[pytest.param(*each, marks=pytest.mark.measure) for each in [(1.0, 0), (0.5, 1), (1.0, 1)]],
    ],
)
@pytest.mark.parametrize(
    "options", [LONG | KL_IN_LOSS, LONG_EXACT | EXACT_KL_IN_LOSS, LONG | KL_IN_REWARD], ids=["k2", "full", "reward"]
)
def test_bandit_ends_at_the_closed_form_for_every_beta_and_seed(tmp_path, options, beta, seed):
    what = f"KL in the {options['kl_placement']}, {options.get('kl_estimator', 'k1')}, β = {beta}, seed {seed}"
    assert_ends_at_optimum(train(tmp_path, beta, seed, **options), beta, what)


@pytest.mark.proof
def test_bandit_whitened_with_the_kl_in_the_reward_ends_at_the_closed_form(tmp_path):
    """Reward and KL are whitened together, so only the step size changes."""
    outcome = train(tmp_path, 3.0, 0, **LONG, **KL_IN_REWARD, whiten_advantages=True, scale=3.0)
    assert_ends_at_optimum(outcome, 3.0, "KL in the reward, whitened")


@pytest.mark.proof
def test_bandit_whitened_with_the_kl_in_the_loss_ends_elsewhere(tmp_path):
    """Dividing the advantages by σ, the rewards' standard deviation under π_θ, multiplies β by σ."""
    outcome = train(tmp_path, 3.0, 0, **LONG, **KL_IN_LOSS, whiten_advantages=True, scale=3.0)
    assert report("KL in the loss, whitened, from π*", outcome, outcome.optimum(3.0)) > 5 * BOUND
    probabilities = outcome.policy.exp()
    mean = probabilities @ outcome.rewards
    sigma = (probabilities @ (outcome.rewards - mean).square()).sqrt().item()
    assert report(f"the same, from π* of β · σ, σ = {sigma:.3f}", outcome, outcome.optimum(3.0 * sigma)) < BOUND


@pytest.mark.proof
def test_bandit_with_k3_in_the_loss_ends_at_the_optimum_of_the_reverse_kl(tmp_path):
    """E[r] − β KL(π_ref ‖ π) is largest at π = β π_ref / (λ − r), with the λ > max r for which this sums to 1."""
    outcome = train(tmp_path, 1.0, 0, **LONG, kl_placement="loss", kl_estimator="k3")
    low, high = outcome.rewards.max().item(), outcome.rewards.max().item() + 1.0  # at λ = max r + β the sum is below 1
    for _ in range(60):
        middle = (low + high) / 2
        total = (outcome.reference.exp() / (middle - outcome.rewards)).sum()
        low, high = (middle, high) if total > 1 else (low, middle)
    reverse_optimum = outcome.reference - (high - outcome.rewards).log()
    assert report("k3 in the loss, from π*", outcome, outcome.optimum(1.0)) > 5 * BOUND
    assert report("the same, from the optimum of the reverse KL", outcome, reverse_optimum) < BOUND
