"""`PPOTrainerX`: its constructor, steps and batches, actor and critic."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

import tiny
from families.configs import member
from ppo_runs import (
    changed,
    log_lines,
    logged,
    ppo_config,
    ppo_run,
    ppo_trainer,
    response_lengths,
    snapshot,
    sum_of_terms,
)
from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.masked import identity
from trl_ext.ppo.micro_batches import draw_micro_batches
from trl_ext.ppo.roles.critic import ValueHead


ACTORS = ["gpt2", "gemma2", "mixtral", "qwen3_moe"]

WITHOUT_MODEL = {"reward_model": None, "reward_funcs": response_lengths}


def is_head(name):
    return name.startswith("critic.")


# --- the constructor


def test_four_models_may_be_paths(tmp_path, monkeypatch):
    paths = tiny.save_tiny(tmp_path)
    tiny.tiny_reward_model(7).save_pretrained(tmp_path / "value")
    tiny.tiny_actor(5).save_pretrained(tmp_path / "reference")
    monkeypatch.chdir(tmp_path)
    trainer = PPOTrainerX(
        model=paths["actor"],
        ref_model=str(tmp_path / "reference"),
        reward_model=paths["reward_model"],
        value_model=str(tmp_path / "value"),
        train_dataset=tiny.tiny_prompts(8),
    )
    assert changed(trainer.ref_model, snapshot(tiny.tiny_actor(5))) == set()
    assert changed(trainer.reward_funcs[0].model, snapshot(tiny.tiny_reward_model())) == set()
    assert changed(trainer.critic.model, snapshot(tiny.tiny_reward_model(7))) == set()
    assert trainer.processing_class.get_vocab() == tiny.tiny_tokenizer().get_vocab()
    assert trainer.args.output_dir == "actor-PPO"  # without a config, the defaults


def test_models_may_be_named_in_the_config(tmp_path):
    paths = tiny.save_tiny(tmp_path)
    args = ppo_config(
        tmp_path / "run", sft_model_path=paths["actor"], reward_model_path=paths["reward_model"], max_steps=1
    )
    trainer = PPOTrainerX(args, train_dataset=tiny.tiny_prompts(8))
    trainer.train()
    assert trainer.state.global_step == 1


def test_args_of_the_trainer_are_a_copy_for_the_loop(tmp_path):
    args = ppo_config(tmp_path, num_mini_batches=2, total_episodes=8)
    written = copy.deepcopy(args)
    trainer = PPOTrainerX(
        args,
        tiny.tiny_tokenizer(),
        tiny.tiny_actor(),
        reward_model=tiny.tiny_reward_model(),
        train_dataset=tiny.tiny_prompts(8),
    )
    assert args == written
    assert (trainer.args.gradient_accumulation_steps, args.gradient_accumulation_steps) == (1, 2)
    assert trainer.args.max_steps == 8
    assert PPOConfigX(**trainer.args.to_dict()) == written


# --- steps and batches


def test_logging_evaluation_and_saving_count_optimizer_steps(tmp_path):
    trainer = ppo_run(
        tmp_path,
        {"eval_dataset": tiny.tiny_prompts(2, seed=3)},
        num_mini_batches=2,
        max_steps=6,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        num_sample_generations=0,
    )
    history = trainer.state.log_history
    assert [line["step"] for line in history if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in history if "eval_reward/score" in line] == [3, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.parametrize(
    "options, steps, rollouts",
    [
        ({"total_episodes": 10}, 6, 3),  # rounded up to whole rollouts
        ({"max_steps": 3}, 3, 2),
        ({"num_train_epochs": 2}, 16, 8),  # an epoch of 18 prompts holds 4 rollouts of 4
        ({"num_train_epochs": 0.5}, 4, 2),
    ],
)
def test_plan_is_printed_and_kept(tmp_path, capsys, options, steps, rollouts):
    trainer = ppo_run(tmp_path, {"train_dataset": tiny.tiny_prompts(18)}, **options)
    assert trainer.state.global_step == steps
    plan = re.search(r"PPO plan: (.*)", capsys.readouterr().out)[1]
    assert plan == (
        "4 prompts per rollout (4 × 1 process), 1 mini-batch of 4, micro-batches of 2 per process, "
        f"2 epochs; {steps} optimizer steps, 2 per rollout; {rollouts} rollouts, {4 * rollouts} episodes."
    )
    assert len(logged(trainer, "reward/score")) == rollouts


def test_batch_of_one_trains(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "total_episodes": 2}
    trainer = ppo_run(tmp_path, **options)
    assert trainer.state.global_step == 4


# --- the actor


@pytest.mark.parametrize("name, critic", [*zip(ACTORS, ["model", "head"] * 2, strict=True)])
def test_causal_lm_of_many_kinds_trains(tmp_path, name, critic):
    actor = member(name, 0)
    options = {"critic": critic, "kl_estimator": "full" if critic == "head" else "k2"}
    trainer = ppo_trainer(tmp_path, WITHOUT_MODEL | {"model": actor}, max_steps=2, **options)
    before = snapshot(trainer.model)
    trainer.train()
    first, second = log_lines(trainer)
    assert first["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert first["kl/ref"] == pytest.approx(0, abs=1e-4)
    assert second["policy/ratio_max"] > 1.001
    for line in (first, second):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)
        assert ("terms/aux_loss" in line) == ("output_router_logits" in actor.config.to_dict())
    moved = changed(trainer.model, before)
    assert any(is_head(name) for name in moved)
    assert any(not is_head(name) for name in moved)


@pytest.mark.parametrize("critic, estimator", [("model", "k2"), ("head", "full")])
def test_padding_changes_neither_loss_nor_gradient(tmp_path, critic, estimator):
    trainer = ppo_run(tmp_path, max_steps=1, response_length=40, critic=critic, kl_estimator=estimator)
    rollout = trainer.run_state.rollout
    ((batch,), *_) = draw_micro_batches(rollout, trainer.args, identity, torch.max, num_processes=1, packs=True)
    batch.rows = torch.tensor([0, 1, 2, 3])
    assert not rollout.attended.all()
    assert not rollout.prompt_mask.all()

    def loss_and_gradients():
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        return loss.item(), {
            name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None
        }

    trainer.model.train()
    loss, gradients = loss_and_gradients()
    rollout.prompt_ids[~rollout.prompt_mask] = 33
    rollout.response_ids[~rollout.attended] = 44
    for name in ("advantages", "returns", "old_values", "old_logps", "ref_logps"):
        getattr(rollout, name)[~rollout.mask] = -1e6  # a ratio of exp(1e6) would overflow
    garbage_loss, garbage_gradients = loss_and_gradients()
    assert garbage_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(garbage_gradients[name], gradient, rtol=1e-5, atol=1e-7)
    rollout.response_ids[rollout.attended] = 44  # the control
    assert abs(loss_and_gradients()[0] - loss) > 1e-3


# --- the critic


def critic_of(tmp_path, models=None, **options):
    return ppo_trainer(tmp_path, models, **options).critic


def test_critic_is_a_copy_of_the_reward_model_that_shares_the_tokenizer(tmp_path):
    reward_model = tiny.tiny_reward_model()
    trainer = ppo_trainer(tmp_path, {"reward_model": reward_model})
    assert trainer.critic.model is not reward_model
    assert changed(trainer.critic.model, snapshot(reward_model)) == set()
    assert all(parameter.requires_grad for parameter in trainer.critic.parameters())
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())


def test_critic_is_a_copy_of_the_actors_trunk_by_default(tmp_path):
    own = tiny.tiny_tokenizer()
    own.add_tokens(["zebra"])
    other = {"reward_model": tiny.tiny_reward_model(vocab_size=80), "reward_processing_classes": [own]}
    for models in (WITHOUT_MODEL, other):
        critic = critic_of(tmp_path, models)
        assert isinstance(critic.model, LlamaForSequenceClassification)
        trunk = {name: tensor for name, tensor in snapshot(tiny.tiny_actor()).items() if name.startswith("model.")}
        assert changed(critic.model.model, {n.removeprefix("model."): t for n, t in trunk.items()}) == set()
        assert not critic.model.score.weight.any()  # a new head says 0


def test_critic_of_an_adapter_is_a_copy_of_the_merged_trunk(tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    actor = get_peft_model(tiny.tiny_actor(), lora)
    merged = copy.deepcopy(actor).merge_and_unload()
    critic = critic_of(tmp_path, WITHOUT_MODEL | {"model": actor})
    assert changed(critic.model.model, snapshot(merged.model)) == set()


def test_critic_of_an_architecture_without_a_classifier_points_to_the_head(tmp_path):
    actor = member("cohere", 0)
    with pytest.raises(ValueError, match=r"no sequence classification model for CohereForCausalLM.*`critic='head'`"):
        ppo_trainer(tmp_path, WITHOUT_MODEL | {"model": actor})
    assert isinstance(critic_of(tmp_path, WITHOUT_MODEL | {"model": actor}, critic="head"), ValueHead)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


def test_critic_whose_classifier_has_more_than_the_trunk_points_to_the_head(tmp_path):
    """BERT's has a pooler, which the decoder lacks."""
    actor = member("bert", 0)
    with pytest.raises(ValueError, match=r"BertForSequenceClassification .* pooler\.dense\.weight.* `critic='head'`"):
        ppo_trainer(tmp_path, WITHOUT_MODEL | {"model": actor})
    ppo_run(tmp_path, WITHOUT_MODEL | {"model": actor}, critic="head", total_episodes=4)


def test_head_and_actor_share_one_forward_of_the_trunk(tmp_path):
    trainer = ppo_trainer(tmp_path, critic="head", max_steps=1, num_ppo_epochs=1, gradient_checkpointing=False)
    trunk, critic = count_calls(trainer.model.model), count_calls(trainer.critic)
    trainer.train()
    assert trunk.count(True) == 2  # one per micro-batch
    assert critic.count(True) == 2


@pytest.mark.parametrize("critic", ["model", "head"])
def test_critic_takes_no_part_in_generation(tmp_path, critic):
    trainer = ppo_trainer(tmp_path, critic=critic)
    calls = count_calls(trainer.critic)
    trainer._generate(["cat", "dog bird"])
    assert calls == []


def test_actor_and_critic_have_one_optimizer_and_their_own_learning_rates(tmp_path):
    trainer = ppo_trainer(tmp_path, learning_rate=1e-3, critic_learning_rate=5e-2, max_steps=1, weight_decay=0.1)
    before = snapshot(trainer.model)
    trainer.train()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {names[id(p)]: group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert set(rates) == set(names.values())
    assert {rate for name, rate in rates.items() if is_head(name)} == {5e-2}
    assert {rate for name, rate in rates.items() if not is_head(name)} == {1e-3}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, value in decay.items():
        assert value == (0.0 if "norm" in name else 0.1)
    # Adam's first step is as long as the learning rate.
    steps = {name: (p - before[name]).abs().max().item() for name, p in trainer.model.named_parameters()}
    assert steps["critic.model.score.weight"] == pytest.approx(5e-2, rel=0.1)
    assert steps["lm_head.weight"] == pytest.approx(1e-3, rel=0.1)


def test_given_optimizer_is_used_for_both(tmp_path):
    actor, value_model = tiny.tiny_actor(), tiny.tiny_reward_model(7)
    optimizer = torch.optim.SGD([*actor.parameters(), *value_model.parameters()], lr=1e-2)
    models = {"model": actor, "value_model": value_model, "optimizers": (optimizer, None)}
    trainer = ppo_run(tmp_path, models, max_steps=1)
    assert trainer.optimizer.optimizer is optimizer
    assert changed(value_model, snapshot(tiny.tiny_reward_model(7)))
    start = snapshot(tiny.tiny_actor())
    assert any(not torch.equal(actor.get_parameter(name), tensor) for name, tensor in start.items())


def test_second_training_starts_with_a_rollout_of_its_own(tmp_path):
    trainer = ppo_trainer(tmp_path, max_steps=3, num_ppo_epochs=2, logging_steps=2)
    trainer.train()
    assert trainer.is_amid_rollout, "not in mid-rollout"
    trainer.train()
    first_lines = [line for line in trainer.state.log_history if "loss" in line]
    assert first_lines[0]["policy/ratio_max"] >= 1.0
    assert "reward/score" in first_lines[0]


def test_torch_compile_compiles_nothing_and_changes_no_number(tmp_path, caplog):
    """A reference, a critic and a reward model beside the actor."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    short = {"total_episodes": 4, "num_ppo_epochs": 1}
    compiled = ppo_run(tmp_path / "compiled", torch_compile=True, torch_compile_backend="eager", **short)
    assert torch._dynamo.utils.counters["frames"]["total"] == 0
    assert "`torch_compile` compiles nothing here" in caplog.text
    assert logged(compiled, "loss") == logged(ppo_run(tmp_path / "plain", **short), "loss")
