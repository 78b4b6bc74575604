"""optimizer.py: the critic's own groups, schedule, steps and clipping, against the same computed by hand."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback, get_scheduler

import tiny
from ppo_runs import changed, log_lines, ppo_run, ppo_trainer, snapshot
from trl_ext import PPOTrainerX
from trl_ext.masked import identity
from trl_ext.ppo.optimizer import ROLE, StepsByRole, norms_by_role


pytestmark = pytest.mark.integration

HEAD = {"critic": "head", "critic_stop_gradient": True}
LORA = {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")}


def of_critic(trainer):
    return {
        name for name, parameter in trainer.model.named_parameters() if "critic." in name and parameter.requires_grad
    }


class KeepNorms(TrainerCallback):
    """Keeps, before every step, the norm of the gradient of the actor and of the critic."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        parts = {"actor": [], "critic": []}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts["critic" if "critic." in name else "actor"].append(parameter.grad.norm().item() ** 2)
        self.norms.append({role: sum(squares) ** 0.5 for role, squares in parts.items()})


# --- steps of the critic alone


def watched(trainer):
    """Return a list that gets, for each call of `_step_critic`, the weights and optimizer states before and after."""
    step, seen = trainer._step_critic, []

    def watch(model):
        def now():
            states = trainer.optimizer.state
            kept = {n: copy.deepcopy(dict(states[p])) for n, p in trainer.model.named_parameters() if p in states}
            return snapshot(trainer.model), kept

        first = trainer._step % trainer.args.steps_per_generation
        before = now()
        step(model)
        if first % trainer.args.gradient_accumulation_steps == 0:
            seen.append((before, now(), copy.deepcopy(trainer.run_state.micro_batches[first:])))

    trainer._step_critic = watch
    return seen


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "models, options",
    [
        ({}, {}),
        ({}, {"micro_batch_tokens": 30}),
        ({}, {"num_mini_batches": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        ({}, HEAD),
        (LORA, {}),
        (LORA, HEAD),
        ({}, {"critic_warmup_steps": 2, "weight_decay": 0.1}),
    ],
)
def test_extra_steps_move_the_critic_and_leave_the_actor_and_its_adam_bitwise(tmp_path, models, options):
    trainer = ppo_trainer(tmp_path, models, **({"critic_steps": 3, "max_steps": 3} | options))
    seen = watched(trainer)
    trainer.train()
    assert trainer.state.global_step == len(seen) == 3
    critic = of_critic(trainer)
    for (weights, states), (later, later_states), _ in seen:
        moved = {name for name in weights if not torch.equal(weights[name], later[name])}
        assert moved
        assert moved <= critic
        for name in later_states.keys() - critic:
            assert same_state(states[name], later_states[name]), name
    steps = {name: state["step"] for name, state in seen[-1][1][1].items() if name in critic}
    assert set(map(float, steps.values())) == {
        8.0
    }  # three on each of two mini-batches, and the extra ones of the third


def steps_by_hand(critic, rollout, steps, cliprange_value, largest_norm):
    """Train the critic on the loss summed over the mini-batch's tokens one by one, with torch's Adam."""
    adam = torch.optim.AdamW(critic.parameters(), lr=1e-2, weight_decay=0.0)
    num_tokens = int(rollout.mask.sum())
    for _ in range(steps):
        loss = 0.0
        for row in range(len(rollout)):
            inputs = {name: tensor[row : row + 1] for name, tensor in rollout.model_inputs().items()}
            states = critic.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            values = critic.score(states.last_hidden_state)[0, -rollout.mask.size(1) - 1 : -1, 0]
            for t in rollout.mask[row].nonzero().flatten().tolist():
                old, target = rollout.old_values[row, t], rollout.returns[row, t]
                near = torch.minimum(torch.maximum(values[t], old - cliprange_value), old + cliprange_value)
                loss = loss + 0.5 * torch.maximum((values[t] - target) ** 2, (near - target) ** 2) / num_tokens
        adam.zero_grad()
        (0.5 * loss).backward()  # `vf_coef`
        torch.nn.utils.clip_grad_norm_(critic.parameters(), largest_norm)
        adam.step()
    return critic


def apart(weights, critic):
    """The largest relative distance of a parameter; Adam turns the rounding of a gradient near 0 into a step."""
    return max(
        ((weights[f"critic.model.{name}"] - parameter).norm() / parameter.norm()).item()
        for name, parameter in critic.named_parameters()
    )


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 30}, {"critic_max_grad_norm": 0.02}], ids=str)
def test_extra_steps_are_adams_on_the_value_loss(tmp_path, options):
    trainer = ppo_trainer(tmp_path, critic_steps=3, max_steps=1, learning_rate=1e-2, cliprange_value=0.05, **options)
    seen, start = watched(trainer), copy.deepcopy(trainer.critic.model)
    trainer.train()
    (_, (after, _), micro_batches), largest = seen[0], options.get("critic_max_grad_norm", 1.0)
    rollout = micro_batches[0][0].rollout
    assert apart(after, steps_by_hand(copy.deepcopy(start), rollout, 2, 0.05, largest)) < 1e-3
    # Controls: one step, half of the tokens, no clipping of the value.
    assert apart(after, steps_by_hand(copy.deepcopy(start), rollout, 1, 0.05, largest)) > 1e-2
    half = rollout.select(torch.arange(len(rollout) // 2))
    assert apart(after, steps_by_hand(copy.deepcopy(start), half, 2, 0.05, largest)) > 1e-2
    assert apart(after, steps_by_hand(copy.deepcopy(start), rollout, 2, 9.0, largest)) > 1e-2


def test_joint_step_follows_with_the_state_that_the_extra_steps_left(tmp_path):
    """The values of the joint step are those of the critic after its own: the logged value loss falls."""
    options = {"max_steps": 1, "learning_rate": 1e-4, "critic_learning_rate": 1e-2, "cliprange_value": None}
    losses = [
        log_lines(ppo_run(tmp_path / str(steps), critic_steps=steps, **options))[0]["terms/value_loss"]
        for steps in (1, 2, 4)
    ]
    assert losses[0] > losses[1] > losses[2]


def test_trunk_is_read_once_for_all_extra_steps_of_a_head(tmp_path):
    trainer = ppo_trainer(tmp_path, **HEAD, critic_steps=4, max_steps=1, micro_batch_tokens=10_000)
    calls, inside = [], [False]
    trainer.model.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()) if inside[0] else None)
    step = trainer._step_critic

    def watch(model):
        inside[0] = True
        step(model)
        inside[0] = False

    trainer._step_critic = watch
    trainer.train()
    assert calls == [False]


def test_a_value_loss_that_is_not_finite_stops_the_extra_steps(tmp_path):
    trainer = ppo_trainer(tmp_path, critic_steps=2, max_steps=2)
    seen = watched(trainer)

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with torch.no_grad():
                trainer.critic.model.score.weight.fill_(torch.nan)

    trainer.add_callback(Break())
    with pytest.raises(FloatingPointError, match="value_loss"):
        trainer.train()
    assert len(seen) == 1


# --- clipping and its log


@pytest.mark.parametrize("options", [{}, {"critic": "head"}, {"max_grad_norm": 0.0}], ids=str)
def test_norms_by_role_make_up_the_norm(tmp_path, options):
    for line in log_lines(ppo_run(tmp_path, **options)):
        of_both = (line["grad_norm/actor"] ** 2 + line["grad_norm/critic"] ** 2) ** 0.5
        assert of_both == pytest.approx(float(line["grad_norm"]), rel=1e-5)


def test_norm_of_the_actor_is_not_logged_while_it_does_not_learn(tmp_path):
    first, *_, last = log_lines(ppo_run(tmp_path, critic_warmup_steps=1))
    assert "grad_norm/actor" not in first
    assert first["grad_norm/critic"] > 0
    assert last["grad_norm/actor"] > 0


@pytest.mark.parametrize("options, models", [({}, {}), ({"critic": "head"}, {}), ({}, LORA)], ids=str)
def test_actor_and_critic_are_clipped_by_norms_of_their_own(tmp_path, options, models):
    """A critic's spike, here by a large coefficient, leaves the actor's gradient as long as it may be."""
    keep = KeepNorms()
    limits = {"max_grad_norm": 0.05, "critic_max_grad_norm": 0.3, "vf_coef": 1e4}
    trainer = ppo_run(tmp_path, models | {"callbacks": [keep]}, **options, **limits)
    for norms, line in zip(keep.norms, log_lines(trainer), strict=True):
        for role, limit in (("actor", 0.05), ("critic", 0.3)):
            assert line[f"grad_norm/{role}"] > limit
            assert norms[role] == pytest.approx(limit, rel=1e-3)


# --- groups and schedules


def groups_of(trainer):
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {names[id(p)]: group for group in trainer.optimizer.param_groups for p in group["params"]}


def test_weight_decay_of_the_critic(tmp_path):
    trainer = ppo_run(tmp_path, critic_weight_decay=0.3, weight_decay=0.1, max_steps=1)
    for name, group in groups_of(trainer).items():
        assert group[ROLE] == ("critic" if "critic." in name else "actor")
        assert group["weight_decay"] == (0.0 if "norm" in name else 0.3 if "critic." in name else 0.1), name


@pytest.mark.parametrize(
    "mine, of_critic", [("linear", "constant"), ("constant", "cosine"), ("cosine", "inverse_sqrt")]
)
def test_rates_of_the_critic_follow_a_schedule_of_their_own(tmp_path, mine, of_critic):
    """At every step those of two schedulers of transformers, one for each."""
    rates = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append({group[ROLE]: group["lr"] for group in optimizer.param_groups})

    schedules = {"lr_scheduler_type": mine, "critic_lr_scheduler_type": of_critic, "warmup_steps": 2}
    options = {"learning_rate": 1e-3, "critic_learning_rate": 1e-2, "max_steps": 6}
    ppo_run(tmp_path, {"callbacks": [Keep()]}, **schedules, **options)
    expected = {}
    for role, kind, rate in (("actor", mine, 1e-3), ("critic", of_critic, 1e-2)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        scheduler = get_scheduler(kind, optimizer, num_warmup_steps=2, num_training_steps=6)
        expected[role] = []
        for _ in range(6):
            expected[role].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert [step["actor"] for step in rates] == pytest.approx(expected["actor"])
    assert [step["critic"] for step in rates] == pytest.approx(expected["critic"])


# --- what is frozen


def test_frozen_parameters_of_the_critic_stay(tmp_path):
    trainer = ppo_trainer(tmp_path, freeze_critic=["*self_attn*", "*norm*"], max_steps=2)
    before = snapshot(trainer.model)
    trainer.train()
    frozen = {name for name in before if "critic." in name and ("self_attn" in name or "norm" in name)}
    assert frozen
    assert {name for name in before if "critic." in name} - changed(trainer.model, before) == frozen


@pytest.mark.parametrize(
    "patterns, words",
    [
        (["*attn"], r"'\*attn'.* none of the critic's.* It trains model\.embed_tokens\.weight"),
        (["*"], "the whole critic"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(tmp_path, patterns, words):
    with pytest.raises(ValueError, match=words):
        ppo_trainer(tmp_path, freeze_critic=patterns)


def test_value_loss_stays_out_of_the_trunk(tmp_path):
    """The trunk's gradient is that of a run without a value loss; the head still learns."""

    def gradients(**options):
        trainer, kept = ppo_trainer(tmp_path, max_steps=1, critic="head", max_grad_norm=0.0, **options), {}

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

        with torch.no_grad():
            trainer.critic.score.weight.fill_(0.1)
        trainer.add_callback(Keep())
        trainer.train()
        return kept

    stopped, joint = gradients(critic_stop_gradient=True), gradients()
    without = gradients(vf_coef=0.0)
    in_trunk = [name for name in joint if "critic" not in name]
    assert all(torch.equal(stopped[name], without[name]) for name in in_trunk)
    assert any(not torch.equal(joint[name], without[name]) for name in in_trunk)
    assert torch.equal(stopped["critic.score.weight"], joint["critic.score.weight"])


# --- the objective by a mask


def test_mask_objective_learns_from_tokens_within_the_range_only(tmp_path):
    """Against the loop over tokens, on what a run has logged after steps large enough to leave the range."""
    ranges = {"policy_objective": "mask", "cliprange": 0.05, "cliprange_high": 0.1}
    trainer = ppo_trainer(tmp_path, learning_rate=1e-2, max_steps=2, micro_batch_tokens=10_000, **ranges)
    kept, read = [], PPOTrainerX._forward

    def keep(self, model, part, outputs, **kwargs):
        output = read(self, model, part, outputs, **kwargs)
        if torch.is_grad_enabled():
            kept.append((output.log_probs.detach(), part))
        return output

    trainer._forward = keep.__get__(trainer)
    trainer.train()
    logps, part = kept[1]
    objective, masked, count = 0.0, 0, 0
    for row, t in part.mask.nonzero().tolist():
        ratio = (logps[row, t] - part.old_logps[row, t]).exp().item()
        count += 1
        if 0.95 <= ratio <= 1.1:
            objective += ratio * part.advantages[row, t].item()
        else:
            masked += 1
    line = log_lines(trainer)[1]
    assert 0 < masked < count
    assert line["policy/clip_fraction"] == pytest.approx(masked / count)
    assert line["terms/clip_objective"] == pytest.approx(objective / count, abs=1e-6)


# --- errors, before a model is loaded


@pytest.mark.parametrize(
    "options, words",
    [
        ({"critic_steps": 2, "critic": "adapter"}, "`critic_steps=2` .*`critic='adapter'` shares .*'model'"),
        ({"critic_steps": 2, "critic": "head"}, "`critic_steps=2` .*`critic='head'` shares .*`critic_stop_gradient`"),
        ({"critic_steps": 2, "vf_coef": 0.0}, "`critic_steps=2` is an option of the critic, .* with `vf_coef=0`"),
        ({"critic_lam": 1.0, "vf_coef": 0.0}, "`critic_lam=1.0` is an option of the critic, .* with `vf_coef=0`"),
        ({"critic_warmup_steps": 1.5}, "`critic_warmup_steps` is 1.5; it must be an integer of at least 0"),
        *(
            (
                {"advantage_estimator": "reinforce", name: value},
                f"`{name}=.* of the critic, .*'reinforce'` does not ask",
            )
            for name, value in {
                "critic_learning_rate": 1e-3,
                "critic_weight_decay": 0.1,
                "critic_lr_scheduler_type": "constant",
                "critic_max_grad_norm": 0.5,
                "critic_steps": 2,
                "freeze_critic": ["*norm*"],
                "critic_warmup_steps": 2,
                "critic_warmup_until": 0.5,
            }.items()
        ),
        ({"critic_steps": 2, "optim": "schedule_free_adamw"}, "`critic_steps=2` with `optim='schedule_free_adamw'`"),
        ({"freeze_critic": "*norm*"}, r"`freeze_critic` is '\*norm\*'; it must be a list of patterns"),
        ({"critic_stop_gradient": True}, "`critic_stop_gradient` .*`critic='model'`"),
        ({"critic_max_grad_norm": 1.0, "max_grad_norm": 0.0}, "`critic_max_grad_norm=1.0` with `max_grad_norm=0.0`"),
        (
            {"critic_lr_scheduler_type": "linear", "lr_scheduler_type": "greedy", "metric_for_best_model": "a"},
            "`critic_lr_scheduler_type='linear'` beside `lr_scheduler_type='greedy'`",
        ),
        ({"policy_objective": "mask", "dual_clip": 3.0}, "`dual_clip=3.0` .*'clip'"),
        ({"policy_objective": "mask", "cliprange": 1.0, "cliprange_high": 3.0}, "`cliprange=1.0`.*below 1"),
        ({"policy_objective": "mask", "use_vllm": True}, "`vllm_importance_sampling_correction` .*False"),
        ({"policy_objective": "both"}, "`policy_objective` is 'both'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        ppo_trainer(tmp_path, {"model": str(tmp_path / "nothing")}, **options)


@pytest.mark.parametrize("name, value", [("critic_weight_decay", 0.1), ("critic_learning_rate", 1.0)])
def test_own_optimizer_would_not_follow_the_options_of_the_critic(tmp_path, name, value):
    optimizer = torch.optim.SGD(tiny.tiny_actor().parameters(), lr=1e-2)
    with pytest.raises(ValueError, match=f"`{name}={value}` is followed by .*`optimizers`"):
        ppo_trainer(tmp_path, {"optimizers": (optimizer, None)}, **{name: value})


@pytest.mark.parametrize("options", [{}, {"micro_batch_tokens": 30}, HEAD | {"num_generations": 2}], ids=str)
def test_extra_step_has_the_length_of_the_joint_steps(tmp_path, options):
    """By plain gradient descent, without clipping: one of each on the same rollout, from the same weights."""
    descent = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
    }
    joint = ppo_trainer(tmp_path / "joint", num_ppo_epochs=1, **descent, **options)
    joint.train()
    alone = ppo_trainer(tmp_path / "alone", num_ppo_epochs=1, critic_steps=2, **descent, **options)
    start, seen = snapshot(alone.model), watched(alone)
    alone.train()
    (_, (after, _), _) = seen[0]
    for name in of_critic(alone):
        step = joint.model.get_parameter(name) - start[name]
        assert (after[name] - start[name] - step).norm() <= 1e-5 * step.norm(), name


def test_error_in_an_extra_step_says_what_the_critic_has_learned(tmp_path):
    trainer = ppo_trainer(tmp_path, critic_steps=3, max_steps=1)
    accumulate, calls = trainer._accumulate, []

    def break_the_second(model, micro_batches):
        calls.append(None)
        if len(calls) == 2:
            with torch.no_grad():
                trainer.critic.model.score.weight.fill_(torch.inf)
        accumulate(model, micro_batches)

    trainer._accumulate = break_the_second
    with pytest.raises(FloatingPointError, match="only the critic was updated, in 1 steps of its own"):
        trainer.train()


def test_critic_that_is_the_actors_trunk_is_refused(tmp_path):
    models = {"model": tiny.tiny_actor(), "value_model": tiny.tiny_reward_model()}
    models["value_model"].model = models["model"].model
    with pytest.raises(ValueError, match="shares parameters with the actor"):
        ppo_trainer(tmp_path, models)


# --- the optimizer alone


def test_norms_by_role_are_those_of_the_unscaled_gradients():
    model = torch.nn.Linear(2, 1)
    model.critic = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[6.0, 8.0]])
    model.bias.grad = None
    assert norms_by_role(model, model.critic, 2.0) == {"actor": 5.0}
    model.critic.weight.grad = torch.tensor([[0.0, 3.0]])
    assert norms_by_role(model, model.critic, 2.0) == {"actor": 5.0, "critic": 1.5}


def test_actor_is_passed_over_though_its_gradient_is_zero_and_adam_has_moments():
    """As ZeRO steps: group by group, with zeros where a role has no gradient. The control steps both."""
    actor, critic = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = torch.optim.AdamW([{"params": [actor], ROLE: "actor"}, {"params": [critic], ROLE: "critic"}], lr=0.1)
    steps = StepsByRole()
    steps.on_train_begin(None, None, None, optimizer=optimizer)
    steps.on_train_begin(None, None, None, optimizer=optimizer)  # a second run
    groups = optimizer.param_groups

    def step(of_actor, of_critic):
        actor.grad, critic.grad = torch.full((3,), of_actor), torch.full((3,), of_critic)
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
        optimizer.param_groups = groups
        return actor.detach().clone()

    before = step(3.0, 4.0)
    norms = steps.pop_norms(10.0, identity, torch.device("cpu"))
    assert norms == pytest.approx({"actor": 6.0, "critic": 8.0})
    kept, value = copy.deepcopy(optimizer.state[actor]), critic.detach().clone()
    with steps.critic_alone():
        assert torch.equal(step(0.0, 1.0), before)
    assert same_state(optimizer.state[actor], kept)
    assert not torch.equal(critic, value)
    steps.forget_norms()
    assert steps.pop_norms(1.0, identity, torch.device("cpu")) == {}
    assert not torch.equal(step(0.0, 1.0), before)
