"""The policy term is GRPO's, CUDA computes what a CPU does, the first step is exact; see also test_proof_random.py."""

import pytest
import torch
from torch import nn
from trl import GRPOConfig, GRPOTrainer

import ppo_runs
import tiny
from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.models import scoring_head
from trl_ext.ppo import losses
from trl_ext.ppo.roles import join
from trl_ext.ppo.rollout import MicroBatch, Rollout


pytestmark = pytest.mark.integration


TEMPERATURE, CLIPRANGE, CLIPRANGE_VALUE = 0.7, 0.2, 0.3
COEF = {"kl_coef": 0.3, "vf_coef": 0.7, "ent_coef": 0.02, "old_kl_coef": 0.4}
ONLY_POLICY = {"kl_coef": 0.0, "vf_coef": 0.0, "ent_coef": 0.0}

# What the tool wrote is marked 0: holes in the middle, at the start and at the end; lengths from 1 to 7.
ENV_MASK = [
    [1, 1, 1, 1, 1, 1, 1],
    [1, 1, 0, 0, 1, 1],
    [0, 1, 1],
    [1],
    [1, 0, 1, 0, 0, 1, 0],
    [1, 1, 1, 1],
]


def make_trainer(tmp_path, **options):
    """A trainer on tiny models, all with different weights; `options` are those of the config or of the trainer."""
    models = {
        "model": tiny.tiny_actor(0),
        "ref_model": tiny.tiny_actor(5) if options.get("kl_coef", 1) else None,
        "reward_model": tiny.tiny_reward_model(1),
        "value_model": None if options.get("critic") == "head" else tiny.tiny_reward_model(7),
        "train_dataset": tiny.tiny_prompts(16),
    }
    models |= {name: options.pop(name) for name in [*models, "rollout_func", "callbacks"] if name in options}
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "response_length": 7,
        "temperature": TEMPERATURE,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    trainer = PPOTrainerX(PPOConfigX(**(settings | options)), tiny.tiny_tokenizer(), **models)
    trainer.model.train()
    if options.get("critic") == "head":  # 0 at the start: move it, so that it has something to say
        nn.init.normal_(trainer.critic.score.weight, std=0.5)
    return trainer


def random_responses(generator, lengths):
    return [torch.randint(7, len(tiny.VOCABULARY), (length,), generator=generator).tolist() for length in lengths]


def ragged_rollout(seed=0):
    """Left-padded prompts, right-padded responses with holes, and random numbers for what collecting would fill in."""
    generator = torch.Generator().manual_seed(seed)
    prompts = random_responses(generator, [5, 1, 3, 4, 2, 5])
    responses = random_responses(generator, [len(row) for row in ENV_MASK])
    width, length = max(map(len, prompts)), max(map(len, responses))

    def right(rows):
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    rollout = Rollout.from_ids(
        prompt_ids=torch.tensor([[0] * (width - len(row)) + row for row in prompts]),
        prompt_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]),
        response_ids=right(responses),
        attended=right([[1] * len(row) for row in responses]).bool(),
    )
    rollout.mask = right(ENV_MASK).bool()
    rollout.advantages = torch.randn(rollout.mask.shape, generator=generator)
    rollout.returns = torch.randn(rollout.mask.shape, generator=generator)
    return rollout


def make_old(trainer, rollout, seed=1):
    """Score with the models, then move old policy and old values to both sides of the clip ranges."""
    generator = torch.Generator().manual_seed(seed)
    trainer._score_with_models(rollout)
    with torch.no_grad():
        logps = trainer._forward(trainer.model, rollout, ("log_probs",)).log_probs
    rollout.old_logps = logps + 0.4 * torch.randn(logps.shape, generator=generator)
    rollout.old_values = rollout.old_values + 0.5 * torch.randn(logps.shape, generator=generator)


def loss_and_gradients(trainer, rollout):
    """Treat the whole rollout as one micro-batch, which is one optimizer batch."""
    trainer.model.zero_grad()
    whole = MicroBatch(rollout, torch.arange(len(rollout)), rollout.mask.sum().item(), share=1.0)
    loss = trainer._compute_loss(trainer.model, whole)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def gradients(*models):
    """Gradients by name, absent ones as 0."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for model in models
        for name, p in model.named_parameters()
    }


def difference(one, other):
    """The largest relative difference of two (loss, gradients): of the loss, and of each tensor by its norm."""
    assert one[1].keys() == other[1].keys()
    largest = abs(one[0] - other[0]) / abs(other[0])
    for name, gradient in other[1].items():
        scale = max(gradient.norm().item(), 1e-4)
        largest = max(largest, (one[1][name] - gradient).norm().item() / scale)
    return largest


# The policy term is GRPO's


def grpo_trainer(tmp_path, **clipping):
    options = clipping | {
        "loss_type": "bnpo",
        "beta": 0.0,
        "epsilon": CLIPRANGE,
        "temperature": TEMPERATURE,
        "num_generations": 2,
    }
    settings = {"per_device_train_batch_size": 6, "bf16": False, "use_cpu": True, "report_to": "none"}
    trainer = GRPOTrainer(
        tiny.tiny_actor(0),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(str(tmp_path), **options, **settings),
        train_dataset=tiny.tiny_prompts(16),
        processing_class=tiny.tiny_tokenizer(),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def grpo_loss_and_gradients(trainer, rollout):
    inputs = {
        "prompt_ids": rollout.prompt_ids,
        "prompt_mask": rollout.prompt_mask.long(),
        "completion_ids": rollout.response_ids,
        "completion_mask": rollout.attended.long(),
        "tool_mask": rollout.mask.long(),
        "advantages": rollout.advantages,
        "old_per_token_logps": rollout.old_logps,
    }
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), gradients(trainer.model)


def policy_rollout(trainer):
    """With old log-probabilities that put tokens on both flat sides of the clipped objective."""
    rollout = ragged_rollout()
    make_old(trainer, rollout)
    with torch.no_grad():
        logps = trainer._forward(trainer.model, rollout, ("log_probs",)).log_probs
    ratio, positive = (logps - rollout.old_logps).exp(), rollout.advantages > 0
    for flat in (positive & (ratio > 1 + CLIPRANGE), ~positive & (ratio < 1 - CLIPRANGE)):
        assert (flat & rollout.mask).sum() >= 2, "the rollout does not clip on both sides"
    return rollout


CLIPPING = [{}, {"epsilon_high": 0.35}, {"epsilon_high": 0.25, "delta": 1.4}]


@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_policy_term_equals_grpo(tmp_path, critic, clipping):
    """GRPO's `_compute_loss` reads (B, T) advantages: loss and gradient are ours when the other coefficients are 0."""
    trainer = make_trainer(tmp_path, critic=critic, **ONLY_POLICY, **clipping)
    grpo = grpo_trainer(tmp_path, **clipping)
    rollout = policy_rollout(trainer)
    if "delta" in clipping:
        with torch.no_grad():
            logps = trainer._forward(trainer.model, rollout, ("log_probs",)).log_probs
        beyond = ((logps - rollout.old_logps).exp() > clipping["delta"]) & (rollout.advantages < 0) & rollout.mask
        assert beyond.any()
    loss, by_name = loss_and_gradients(trainer, rollout)
    of_critic = {name: by_name.pop(name) for name in list(by_name) if name.startswith("critic.")}
    assert difference((loss, by_name), grpo_loss_and_gradients(grpo, rollout)) < 1e-5
    assert of_critic
    assert not any(gradient.any() for gradient in of_critic.values())


@pytest.mark.parametrize("mistake", ["other range", "shifted advantages", "tool tokens count", "one-sided clip"])
def test_control_another_policy_term_is_not_grpo(tmp_path, monkeypatch, mistake):
    trainer, grpo = make_trainer(tmp_path, critic="head", **ONLY_POLICY), grpo_trainer(tmp_path)
    rollout = policy_rollout(trainer)
    expected = grpo_loss_and_gradients(grpo, rollout)
    if mistake == "other range":
        trainer.args.cliprange = 0.25
    elif mistake == "shifted advantages":
        rollout.advantages = rollout.advantages.roll(1, dims=1)
    elif mistake == "tool tokens count":
        rollout.mask = rollout.attended
    elif mistake == "one-sided clip":
        monkeypatch.setattr(
            losses, "clip_objective", lambda ratio, advantages, e, *_: ratio.clamp(max=1 + e) * advantages
        )
    loss, by_name = loss_and_gradients(trainer, rollout)
    by_name = {name: gradient for name, gradient in by_name.items() if not name.startswith("critic.")}
    assert difference((loss, by_name), expected) > 1e-2


# The whole loss on another device


def old_rollout(trainer):
    rollout = ragged_rollout()
    make_old(trainer, rollout)
    return rollout


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_bf16_run_on_cuda_equals_one_on_a_cpu_in_float32(tmp_path, critic, weights):
    """The same rollout, whose old log-probabilities and values are the CPU's."""
    models = {
        "model": tiny.tiny_actor(0).to(weights),
        "ref_model": tiny.tiny_actor(5).to(weights),
        "value_model": None if critic == "head" else tiny.tiny_reward_model(7).to(weights),
    }
    exact = make_trainer(tmp_path / "cpu", critic=critic, bf16=False, **COEF)
    rollout = old_rollout(exact)
    trainer = make_trainer(tmp_path / "cuda", critic=critic, bf16=True, use_cpu=False, **(COEF | models))
    if critic == "head":
        trainer.critic.score.load_state_dict(exact.critic.score.state_dict())
    on_cuda = Rollout(**{name: x.cuda() if torch.is_tensor(x) else x for name, x in vars(rollout).items()})
    with trainer.compute_loss_context_manager():
        loss, by_name = loss_and_gradients(trainer, on_cuda)
    got = loss, {name: gradient.float().cpu() for name, gradient in by_name.items()}
    expected = loss_and_gradients(exact, rollout)
    assert apart(got, expected) < 0.1


def apart(one, other):
    """The relative difference of two (loss, gradients): of the loss, or of all gradients by their norm."""
    squares = [(one[1][name].double() - gradient.double()).square().sum() for name, gradient in other[1].items()]
    size = sum(gradient.double().square().sum() for gradient in other[1].values())
    return max(abs(one[0] - other[0]) / abs(other[0]), (sum(squares) / size).sqrt().item())


# The first step


def first_log_line(tmp_path, **options):
    """Of an actor whose config asks for dropout; every forward pass has four sequences."""
    sizes = {"per_device_train_batch_size": 4, "local_rollout_forward_batch_size": 4, "total_episodes": 8}
    models = {"model": tiny.tiny_actor(0, attention_dropout=0.5)}
    return ppo_runs.log_lines(ppo_runs.ppo_run(tmp_path, models, **(sizes | {"kl_coef": 0.1} | options)))[0]


@pytest.mark.parametrize(
    "leash, num_mini_batches",
    [
        ({"kl_estimator": "k2"}, 1),
        ({"kl_estimator": "k2"}, 2),
        ({"kl_estimator": "k3"}, 2),
        ({"kl_estimator": "full", "critic": "head"}, 1),
        ({"kl_placement": "reward", "critic": "head"}, 2),
    ],
    ids=str,
)
def test_first_step_has_ratio_exactly_1_and_kl_exactly_0(tmp_path, leash, num_mini_batches):
    """With two mini-batches the old log-probabilities come from a pass of their own, else from the learning pass."""
    line = first_log_line(tmp_path, num_mini_batches=num_mini_batches, **leash)
    assert line["policy/ratio_max"] == line["policy/ratio_mean"] == 1.0
    assert line["policy/clip_fraction"] == line["terms/old_kl"] == line["kl/ref"] == 0.0
    assert line.get("terms/kl", 0.0) == 0.0


def test_control_dropout_shows_in_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "disable_noise", lambda model: None)
    monkeypatch.setattr(scoring_head, "silence", lambda *args: None)
    monkeypatch.setattr(PPOTrainerX, "_check_reference", lambda self, rollout: None)  # it stops such a run
    line = first_log_line(tmp_path, num_mini_batches=2, packing=False)  # packed rows refuse dropout in attention
    assert line["policy/ratio_max"] > 1.1
    assert line["terms/old_kl"] > 0.01
    assert line["terms/kl"] > 0.01


# Old log-probabilities that the first learning pass gives


def trajectory(tmp_path, monkeypatch, **options):
    """Parameters after three rollouts of plain gradient descent; how often log-probabilities were asked for early."""
    asked = []
    forward = PPOTrainerX._forward

    def spy(self, model, part, outputs, **kwargs):
        before_learning = model is self.model and "log_probs" in outputs and not torch.is_grad_enabled()
        asked.extend([1] * (before_learning and not self._reference_is_start))
        return forward(self, model, part, outputs, **kwargs)

    monkeypatch.setattr(PPOTrainerX, "_forward", spy)
    settings = {"total_episodes": 12, "num_ppo_epochs": 3, "optim": "sgd", "learning_rate": 0.1, "kl_coef": 0.1}
    # A reference of its own: nothing has to check that it is the start, which would ask for log-probabilities too.
    trainer = ppo_runs.ppo_run(tmp_path, {"ref_model": tiny.tiny_actor(5)}, **(settings | options))
    monkeypatch.setattr(PPOTrainerX, "_forward", forward)
    return ppo_runs.snapshot(trainer.model), len(asked)


def largest_difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("critic", ["model", "head"])
def test_old_logps_of_the_first_pass_give_the_trajectory_of_those_before_learning(tmp_path, monkeypatch, critic):
    lazy, asked_by_lazy = trajectory(tmp_path, monkeypatch, critic=critic)
    monkeypatch.setattr(PPOTrainerX, "_reads_old_logps_early", True)
    early, asked_by_early = trajectory(tmp_path, monkeypatch, critic=critic)
    assert asked_by_lazy == 0, "log-probabilities were computed before learning"
    assert asked_by_early == 3, "one pass per rollout"
    assert largest_difference(lazy, early) < 1e-5


def test_control_old_logps_in_the_order_of_learning_give_another_trajectory(tmp_path, monkeypatch):
    """The mistake: forgetting that the micro-batches are a permutation of the rollout."""
    correct, _ = trajectory(tmp_path, monkeypatch)
    keep = Rollout.keep_first_logps

    def keep_in_order(self, rows, logps):
        first = getattr(self, "kept", 0)
        self.kept = first + len(rows)
        keep(self, torch.arange(first, self.kept), logps)

    monkeypatch.setattr(Rollout, "keep_first_logps", keep_in_order)
    mistaken, _ = trajectory(tmp_path, monkeypatch)
    assert largest_difference(correct, mistaken) > 1e-3
