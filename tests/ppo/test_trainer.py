"""`PPOTrainerX`: its steps and batches, actor and critic, evaluation, tools; and that no option is dead."""

import copy
import inspect
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import tiny
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
from trl_ext.ppo.critic import ValueHead
from trl_ext.ppo.metrics import held_out_score
from trl_ext.ppo.rollout import Rollout


IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = IDS | SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1}

ACTORS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **IDS)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(final_logit_softcapping=2.0, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, **USUAL)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**USUAL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=8, **USUAL)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(max_position_embeddings=64, **SIZES, **IDS)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **EXPERTS, **USUAL)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(num_experts=4, moe_intermediate_size=8, head_dim=8, **EXPERTS, **USUAL)
    ),
}

WITHOUT_MODEL = {"reward_model": None, "reward_funcs": response_lengths}


def is_head(name):
    return name.startswith("critic.")


# --- the constructor


def test_arguments_may_be_positional_and_only_what_is_needed_is_required(tmp_path):
    trainer = PPOTrainerX(
        ppo_config(tmp_path, max_steps=1),
        tiny.tiny_tokenizer(),
        tiny.tiny_actor(),
        tiny.tiny_actor(5),
        tiny.tiny_reward_model(),
        tiny.tiny_prompts(8),
        tiny.tiny_reward_model(7),
        None,
        tiny.tiny_prompts(3),
        (None, None),
        [],
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert trainer.state.global_step == 1
    assert logged(trainer, "kl/ref")[0] != 0


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


def test_models_do_not_depend_on_how_they_came(tmp_path):
    """Paths and objects give one trajectory."""
    paths = tiny.save_tiny(tmp_path)
    by_path = ppo_run(tmp_path / "a", {"model": paths["actor"], "reward_model": paths["reward_model"]})
    by_object = ppo_run(tmp_path / "b")
    assert logged(by_path, "loss") == logged(by_object, "loss")


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


@pytest.mark.parametrize("epochs, mini_batches", [(1, 1), (3, 1), (1, 4), (2, 2)])
def test_optimizer_steps_per_rollout_are_epochs_times_mini_batches(tmp_path, epochs, mini_batches):
    trainer = ppo_trainer(
        tmp_path,
        num_ppo_epochs=epochs,
        num_mini_batches=mini_batches,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    batches = []
    compute = trainer._compute_loss

    def keep(model, inputs):
        batches.append((trainer.state.global_step, inputs.rows.tolist(), inputs.num_tokens))
        return compute(model, inputs)

    trainer._compute_loss = keep
    trainer.train()
    steps = epochs * mini_batches
    assert trainer.state.global_step == 2 * steps
    assert len(logged(trainer, "reward/score")) == 2
    for step in range(2 * steps):
        rows = [row for at, rows, _ in batches if at == step for row in rows]
        assert len(rows) == 4 // mini_batches
    for rollout in range(2):
        for epoch in range(epochs):
            first = rollout * steps + epoch * mini_batches
            seen = [row for at, rows, _ in batches if first <= at < first + mini_batches for row in rows]
            assert sorted(seen) == [0, 1, 2, 3]  # every response once per epoch


def test_mini_batches_are_redrawn_every_epoch(tmp_path):
    trainer = ppo_trainer(tmp_path, num_ppo_epochs=6, num_mini_batches=4, gradient_accumulation_steps=4)
    orders = []
    draw = trainer._draw_micro_batches

    def keep(rollout):
        batches = draw(rollout)
        orders.append([row for batch in batches for row in batch.rows.tolist()])
        return batches

    trainer._draw_micro_batches = keep
    trainer.train()
    assert len(orders) == 6
    assert len({tuple(order) for order in orders}) > 4


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
        ({"num_train_epochs": 3}, 24, 12),  # an epoch of 18 prompts holds 4 rollouts of 4
        ({"num_train_epochs": 0.5}, 4, 2),
    ],
)
def test_plan_is_printed_and_kept(tmp_path, capsys, options, steps, rollouts):
    trainer = ppo_run(tmp_path, {"train_dataset": tiny.tiny_prompts(18)}, **options)
    assert trainer.state.global_step == steps
    plan = re.search(r"PPO plan: (.*)", capsys.readouterr().out)[1]
    assert plan == (
        "4 prompts per rollout (4 × 1 process(es)), 1 mini-batch(es) of 4, micro-batches of 2 per process, "
        f"2 epoch(s); {steps} optimizer steps, 2 per rollout; {rollouts} rollouts, {4 * rollouts} episodes."
    )
    assert len(logged(trainer, "reward/score")) == rollouts


def test_batch_of_one_trains(tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "total_episodes": 2}
    trainer = ppo_run(tmp_path, **options)
    assert trainer.state.global_step == 4


# --- the actor


@pytest.mark.parametrize("critic", ["model", "head"])
@pytest.mark.parametrize("name", ACTORS)
def test_causal_lm_of_many_kinds_trains(tmp_path, name, critic):
    torch.manual_seed(0)
    actor = ACTORS[name]()
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


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma2"])
def test_left_padding_does_not_change_log_probabilities_and_values(tmp_path, name):
    """Alone, without padding, and beside a longer prompt, with it. GPT-2 has absolute positions."""
    torch.manual_seed(0)
    trainer = ppo_trainer(tmp_path, WITHOUT_MODEL | {"model": ACTORS[name]()})
    nn.init.normal_(trainer.critic.model.score.weight)
    trainer.model.eval()
    prompts = [[7, 8, 9, 10, 11, 12], [20, 21]]
    responses = [[30, 31, 32], [40, 41, 42]]
    together = rollout_of([[*prompts[0]], [0, 0, 0, 0, *prompts[1]]], responses)
    alone = rollout_of([prompts[1]], [responses[1]])
    with torch.no_grad():
        outputs = [trainer._forward(trainer.model, part, ("log_probs", "state_values")) for part in (together, alone)]
    torch.testing.assert_close(outputs[0].log_probs[1], outputs[1].log_probs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[0].state_values[1], outputs[1].state_values[0], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # the control: the model alone, without our call
        logits = tiny_forward(trainer.model, [*prompts[1], *responses[1]])[1:-1] / trainer.temperature
        own = logits.log_softmax(-1).gather(1, torch.tensor(responses[1])[:, None])[:, 0]
    torch.testing.assert_close(outputs[1].log_probs[0], own, rtol=1e-4, atol=1e-5)


def tiny_forward(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0]


def rollout_of(prompts, responses):
    """Left-padded prompts (pad token 0) and responses of one length."""
    prompts, responses = torch.tensor(prompts), torch.tensor(responses)
    return Rollout.from_ids(prompts, prompts != 0, responses, torch.ones_like(responses, dtype=torch.bool))


@pytest.mark.parametrize("critic", ["model", "head"])
@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_what_stands_at_padded_positions_changes_neither_loss_nor_gradient(tmp_path, critic, estimator):
    trainer = ppo_run(tmp_path, max_steps=1, response_length=40, critic=critic, kl_estimator=estimator)
    rollout = trainer._rollout
    batch = trainer._draw_micro_batches(rollout)[0]
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


def test_critic_is_the_value_model_when_there_is_one(tmp_path):
    value_model = tiny.tiny_reward_model(7)
    assert critic_of(tmp_path, {"value_model": value_model}).model is value_model


def test_critic_is_a_copy_of_the_reward_model_that_shares_the_tokenizer(tmp_path):
    reward_model = tiny.tiny_reward_model()
    trainer = ppo_trainer(tmp_path, {"reward_model": reward_model})
    assert trainer.critic.model is not reward_model
    assert changed(trainer.critic.model, snapshot(reward_model)) == set()
    assert all(parameter.requires_grad for parameter in trainer.critic.parameters())
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())


def test_critic_is_a_copy_of_the_actors_trunk_otherwise(tmp_path):
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
    actor = CohereForCausalLM(CohereConfig(**USUAL))
    with pytest.raises(ValueError, match=r"no sequence classification model for CohereForCausalLM.*`critic='head'`"):
        ppo_trainer(tmp_path, WITHOUT_MODEL | {"model": actor})
    assert isinstance(critic_of(tmp_path, WITHOUT_MODEL | {"model": actor}, critic="head"), ValueHead)


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return calls


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


def test_returns_use_advantages_before_whitening(tmp_path):
    plain = ppo_run(tmp_path / "plain", max_steps=1, whiten_advantages=False, learning_rate=0.0)._rollout
    white = ppo_run(tmp_path / "white", max_steps=1, learning_rate=0.0)._rollout
    torch.testing.assert_close(white.returns, plain.returns)
    torch.testing.assert_close(plain.returns, (plain.advantages + plain.old_values) * plain.mask)
    assert not torch.allclose(white.advantages, plain.advantages)


# --- evaluation


def test_evaluation_answers_every_held_out_prompt_and_scores_it(tmp_path):
    seen = []

    def grade(prompts, completions, **kwargs):
        seen.extend(prompts)
        return [float(len(prompt)) for prompt in prompts]

    data = tiny.tiny_prompts(5, seed=3)
    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": data, "ref_model": tiny.tiny_actor(5)}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    before = snapshot(trainer.model)
    metrics = trainer.evaluate()
    assert sorted(seen) == sorted(data["prompt"][:])
    scores = torch.tensor([float(len(prompt)) for prompt in data["prompt"]])
    assert metrics["eval_reward/score"] == pytest.approx(scores.mean().item())
    assert metrics["eval_reward/score_ci95"] == pytest.approx(1.96 * scores.std().item() / 5**0.5, rel=1e-5)
    assert metrics["eval_kl/ref"] > 0.1
    assert metrics["eval_completions/mean_length"] > 1
    assert "eval_loss" not in metrics
    assert changed(trainer.model, before) == set()


def test_several_held_out_sets_are_evaluated_one_by_one(tmp_path):
    def grade(prompts, **kwargs):
        return [float(len(prompt)) for prompt in prompts]

    sets = {
        "short": Dataset.from_dict({"prompt": ["cat"] * 2}),
        "long": Dataset.from_dict({"prompt": ["the cat"] * 3}),
    }
    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": sets}
    trainer = ppo_run(
        tmp_path,
        models,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
    )
    assert logged(trainer, "eval_short_reward/score") == [3.0]
    assert logged(trainer, "eval_long_reward/score") == [7.0]


def test_evaluation_leaves_training_alone(tmp_path):
    models = {"eval_dataset": tiny.tiny_prompts(2, seed=3)}
    trainer = ppo_run(tmp_path, models, eval_strategy="steps", eval_steps=1, num_sample_generations=0)
    plain = ppo_run(tmp_path)
    assert len(logged(plain, "reward/score")) == 2
    for key in ("reward/score", "loss", "kl/ref"):
        assert logged(trainer, key) == logged(plain, key)


def test_evaluations_of_one_policy_give_the_same_responses(tmp_path):
    """So an evaluation differs from the one before it by what was learnt, and by nothing else."""
    seen = []

    def grade(completions, **kwargs):
        seen.append(completions)
        return [float(len(completion)) for completion in completions]

    models = {"reward_model": None, "reward_funcs": grade, "eval_dataset": tiny.tiny_prompts(6, seed=3)}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=3)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert seen[:2] == seen[2:]
    assert seen[0] != seen[1]
    assert "eval_reward/rise" not in first
    assert (second["eval_reward/rise"], second["eval_reward/rise_ci95"]) == (0, 0)


def test_held_out_kl_is_the_mean_over_prompts_with_a_last_batch_of_another_size(tmp_path):
    """A mean of batch means would weigh the last prompt like the two of each batch before."""
    data = tiny.tiny_prompts(5, seed=3)
    kept = []
    trainer = ppo_trainer(
        tmp_path, {"ref_model": tiny.tiny_actor(5), "eval_dataset": data}, per_device_eval_batch_size=2
    )
    measure = trainer._collect_held_out

    def keep(rows):
        kept.append(measure(rows))
        return kept[-1]

    trainer._collect_held_out = keep
    metrics = trainer.evaluate()
    sums = [
        sum((r.old_logps[i, t] - r.ref_logps[i, t]).item() for t in range(r.mask.size(1)) if r.mask[i, t])
        for r in kept
        for i in range(len(r.mask))
    ]
    assert len(sums) == 5
    assert metrics["eval_kl/ref"] == pytest.approx(sum(sums) / 5, rel=1e-5)


def test_rise_is_measured_on_the_same_prompts_only(tmp_path):
    first, other = tiny.tiny_prompts(3, seed=3), tiny.tiny_prompts(3, seed=4)
    trainer = ppo_trainer(tmp_path, {"eval_dataset": first})
    trainer.evaluate()
    assert "eval_reward/rise" not in trainer.evaluate(other)
    assert trainer.evaluate()["eval_reward/rise"] == 0
    assert trainer.evaluate(other)["eval_reward/rise"] == 0


def test_rise_is_paired_by_prompt_and_skips_what_no_reward_scores():
    nan = math.nan
    first, scores = torch.tensor([0.0, 1.0, 2.0, 3.0, nan]), torch.tensor([1.0, 1.0, 5.0, nan, 9.0])
    line = held_out_score(scores, first)
    differences = torch.tensor([1.0, 0.0, 3.0])
    assert line["score"] == pytest.approx(4.0)
    assert line["score_ci95"] == pytest.approx(1.96 * torch.tensor([1.0, 1.0, 5.0, 9.0]).std().item() / 2)
    assert line["rise"] == pytest.approx(4 / 3)
    assert line["rise_ci95"] == pytest.approx(1.96 * differences.std().item() / math.sqrt(3))
    assert "rise" not in held_out_score(scores, first[:4])
    assert held_out_score(torch.full((2,), nan)) == {}


def test_sample_completions_are_printed_with_their_scores(tmp_path, capsys):
    def bracketed(completions, **kwargs):
        return [1.25] * len(completions)

    prompts = Dataset.from_dict({"prompt": ["cat", "dog", "bird"]})
    models = {"reward_model": None, "reward_funcs": bracketed, "eval_dataset": prompts}
    trainer = ppo_trainer(tmp_path, models, per_device_eval_batch_size=2)
    logs = dict(trainer._metrics["eval"])
    trainer.generate_completions()
    output = capsys.readouterr().out
    assert output.count("Samples at step 0") == 2
    assert output.count("1.250") == 3
    assert all(word in output for word in ("cat", "dog", "bird"))
    trainer.generate_completions(sampling=True)
    assert capsys.readouterr().out.count("1.250") == 2
    assert trainer._metrics["eval"] == logs
    assert trainer.model.training


def test_samples_may_hold_what_looks_like_markup(tmp_path, capsys):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_tokens(["[/INST]"])
    models = {
        "processing_class": tokenizer,
        "model": tiny.tiny_actor(vocab_size=65),
        "reward_model": tiny.tiny_reward_model(vocab_size=65),
        "eval_dataset": Dataset.from_dict({"prompt": ["cat [/INST]"]}),
    }
    ppo_trainer(tmp_path, models).generate_completions()
    assert "[/INST]" in capsys.readouterr().out


# --- tokens that the actor did not write


def play(prompts, trainer):
    """A rollout function whose responses hold a token of the environment in the middle."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {
        "prompt_ids": ids,
        "completion_ids": [[10, 11, 12 + row, 13, 2] for row in range(len(ids))],
        "logprobs": [[-1.0] * 5 for _ in ids],
        "env_mask": [[1, 0, 0, 1, 1]] * len(ids),
        "bonus": [float(row) for row in range(len(ids))],
    }


def bonus_of(bonus, **kwargs):
    return bonus


def test_tokens_of_the_environment_are_attended_and_do_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    models = {"reward_model": None, "reward_funcs": bonus_of, "rollout_func": play}
    trainer = ppo_run(tmp_path, models, max_steps=2, gamma=0.9, whiten_advantages=False, kl_placement="reward")
    rollout = trainer._rollout
    hole = torch.tensor([True, False, False, True, True])
    assert rollout.mask.equal(hole.expand(4, 5))
    assert rollout.attended.all()
    assert rollout.scores.tolist() == [0.0, 1.0, 2.0, 3.0]
    # GAE steps over the hole: the response without it has the same advantages.
    values = rollout.old_values[:, hole]
    advantages = torch.zeros(4, 3)
    for t in (2, 1, 0):
        following = values[:, t + 1] if t < 2 else 0
        reward = rollout.scores if t == 2 else 0
        delta = reward + 0.9 * following - values[:, t]
        advantages[:, t] = delta + (0.9 * 0.95 * advantages[:, t + 1] if t < 2 else 0)
    torch.testing.assert_close(rollout.advantages[:, hole], advantages, rtol=1e-5, atol=1e-6)
    assert not rollout.advantages[:, ~hole].any()
    assert logged(trainer, "completions/mean_length") == [3.0]
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)


def test_rollout_takes_over_grpos_masks():
    batch = {
        "prompt_ids": torch.tensor([[0, 7], [8, 9], [8, 9]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1], [1, 1]]),
        "completion_ids": torch.tensor([[10, 11, 2, 0], [10, 2, 12, 13], [10, 11, 12, 13]]),
        "completion_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]),
    }
    rollout = Rollout.from_grpo(batch, torch.tensor([1.0, 2.0, torch.nan]), end_ids=[2])
    assert rollout.mask.int().tolist() == [[1, 0, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert rollout.attended.int().tolist() == batch["completion_mask"].tolist()
    assert rollout.scored.tolist() == [True, True, False]
    assert rollout.scores.tolist() == [1.0, 2.0, 0.0]
    assert rollout.has_eos.tolist() == [True, False, False]  # in the second, an earlier turn ended
    inputs = rollout.model_inputs(position_ids=True)
    assert inputs["labels"].tolist()[0] == [-100, -100, 10, -100, 2, -100]
    assert inputs["attention_mask"].tolist()[0] == [0, 1, 1, 1, 1, 0]
    assert inputs["position_ids"].tolist()[0] == [0, 0, 1, 2, 3, 3]


TOOL_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + ('unk' if message['role'] == 'tool' else message['role']) + '> ' + message['content'] + ' ' }}"
    "{% for call in message.get('tool_calls') or [] %}"
    "{{ call['function']['name'] + ' ' + (call['function']['arguments'] | tojson) + ' ' }}"
    "{% endfor %}"
    "{{ '<eos> ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def look(word: str) -> str:
    """
    Looks a word up.

    Args:
        word: the word.
    """
    return "good film"


class Room:
    """An environment that owns its reward."""

    reward = 0.5

    def reset(self, **kwargs):
        return None

    def look(self, word: str) -> str:
        """
        Looks a word up.

        Args:
            word: the word.
        """
        self.looked = True
        return "good film"

    def get_reward(self):
        return self.reward


def calls_a_tool_once(monkeypatch):
    """Every response is a call of the tool, then three tokens. TRL's own loop runs between the two."""
    call = {"type": "function", "function": {"name": "look", "arguments": {"word": "cat"}}}

    def parse(tokenizer, ids, prefix=None, tools=None):
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        return message | ({"tool_calls": [call]} if ids[0] == 10 else {})

    def turn(self, prompt_ids, *args, **kwargs):
        after_tool = any(tiny.VOCABULARY.index("film") in ids for ids in prompt_ids)
        return [[20, 21, 2] if after_tool else [10, 11, 2] for _ in prompt_ids], None

    monkeypatch.setattr("trl.trainer.grpo_trainer.parse_response", parse)
    monkeypatch.setattr(PPOTrainerX, "_generate_single_turn", turn)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def tool_models():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tokenizer.response_schema = {"type": "object"}
    tokenizer.response_template = {"unused": True}
    prompts = [[{"role": "user", "content": word}] for word in ("cat", "dog", "bird", "fish")]
    return {"processing_class": tokenizer, "train_dataset": Dataset.from_dict({"prompt": prompts})}


@pytest.mark.parametrize("source", ["tools", "environment"])
def test_answers_of_a_tool_are_attended_and_do_not_count(tmp_path, monkeypatch, source):
    calls_a_tool_once(monkeypatch)
    given = {"tools": [look]} if source == "tools" else {"environment_factory": Room, "reward_model": None}
    trainer = ppo_run(tmp_path, tool_models() | given, max_steps=2, response_length=40)
    rollout = trainer._rollout
    film = tiny.VOCABULARY.index("film")
    for row in range(4):
        written = rollout.response_ids[row][rollout.mask[row]].tolist()
        read = rollout.response_ids[row][rollout.attended[row]].tolist()
        assert written == [10, 11, 2, 20, 21, 2]
        assert film in read
        assert film not in written
    assert logged(trainer, "tools/call_frequency") == [1.0]
    assert logged(trainer, "tools/failure_frequency") == [0.0]
    if source == "environment":
        assert logged(trainer, "rewards/Room/mean") == logged(trainer, "reward/score") == [0.5]
    for line in log_lines(trainer):
        assert line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5)


def test_environment_may_bring_its_own_prompts(tmp_path, monkeypatch):
    calls_a_tool_once(monkeypatch)
    monkeypatch.setattr(Room, "reset", lambda self, **kwargs: "bird")
    models = tool_models() | {"environment_factory": Room, "reward_model": None, "train_dataset": None}
    trainer = ppo_run(tmp_path, models, total_episodes=4, response_length=40)
    assert trainer.state.global_step == 2
    prompts = tiny.tiny_tokenizer().batch_decode(trainer._rollout.prompt_ids)
    assert all("bird" in prompt for prompt in prompts)


def test_environments_reward_that_is_not_finite_stops_the_run_and_is_named(tmp_path, monkeypatch):
    calls_a_tool_once(monkeypatch)
    monkeypatch.setattr(Room, "reward", float("nan"))
    models = tool_models() | {"environment_factory": Room, "reward_model": None}
    trainer = ppo_trainer(tmp_path, models, response_length=40)
    with pytest.raises(FloatingPointError, match="The reward 'Room' is nan at step 0"):
        trainer.train()


# --- no option is dead


def two_ends():
    model = tiny.tiny_actor()
    model.generation_config.eos_token_id = [2, 9]
    return {"model": model}


def far_reference():
    return {"ref_model": tiny.tiny_actor(5)}


SAMPLED = {"per_device_train_batch_size": 8, "response_length": 30, "temperature": 2.0}
# Option: what both runs share, its value in the second run, and the models of both.
CASES = {
    "learning_rate": ({}, 5e-3, None),
    "num_ppo_epochs": ({}, 3, None),
    "num_mini_batches": ({}, 2, None),
    "total_episodes": ({}, 12, None),
    "response_length": ({}, 5, None),
    "stop_token": (SAMPLED, "eos", two_ends),
    "stop_token_id": (SAMPLED, 11, None),
    "missing_eos_penalty": (SAMPLED, 2.0, None),
    "normalize_rewards": ({}, True, None),
    "reward_clip": ({}, 0.1, None),
    "whiten_rewards": ({"whiten_advantages": False}, True, None),
    "kl_coef": ({}, 0.5, None),
    "kl_placement": ({}, "reward", None),
    "kl_estimator": ({}, "full", None),
    "kl_controller": ({}, "band", None),
    "kl_target": ({"kl_controller": "proportional", "kl_target": 50.0, "kl_horizon": 10}, 1e-4, far_reference),
    "kl_horizon": ({"kl_controller": "proportional", "kl_target": 1e-4}, 5, far_reference),
    "kl_band": ({"kl_controller": "band", "kl_band": [1e-6, 100.0]}, [1e-6, 1e-5], far_reference),
    "temperature": ({}, 0.5, None),
    "cliprange": ({}, 0.01, None),
    "vf_coef": ({}, 0.1, None),
    "cliprange_value": ({}, 1e-4, None),
    "ent_coef": ({}, 0.5, None),
    "old_kl_coef": ({}, 1.0, None),
    "old_kl_target": ({"old_kl_coef": 1.0}, 1e-6, None),
    "target_kl": ({"num_ppo_epochs": 3}, 1e-6, None),
    "gamma": ({}, 0.5, None),
    "lam": ({}, 0.1, None),
    "advantage_estimator": ({}, "2_step", None),
    "whiten_advantages": ({}, False, None),
    "critic": ({}, "head", None),
    "critic_learning_rate": ({}, 1e-4, None),
    "critic_warmup_steps": ({}, 1, None),
}
# Options that change no number of a run: the test that shows what they do.
SEEN_ELSEWHERE = {
    "local_rollout_forward_batch_size": "test_sequences_per_scoring_pass_are_an_option",
    "num_sample_generations": "test_number_of_sample_tables_is_an_option",
    "dataset_num_proc": "test_prompts_are_checked_in_several_processes",
    "sft_model_path": "test_models_may_be_named_in_the_config",
    "reward_model_path": "test_models_may_be_named_in_the_config",
    "model_adapter_name": "test_named_adapters_are_trained_and_referred_to",
    "ref_adapter_name": "test_named_adapters_are_trained_and_referred_to",
    # In test_placement.py and test_quantized_frozen.py
    "offload_frozen_models": "test_a_frozen_model_is_on_the_device_while_it_scores_and_at_no_other_time",
    "reward_model_quantization": "test_scores_are_those_of_the_checkpoint_in_fewer_bits",
    "ref_model_quantization": "test_kl_is_to_the_reference_in_fewer_bits",
}
GRPO_NAMES = {"max_completion_length", "beta", "epsilon", "num_iterations", "entropy_coef", "num_generations"}


def test_every_option_of_ppo_is_in_one_of_the_lists():
    topics = [part for part in PPOConfigX.__mro__ if part.__module__.startswith("trl_ext.")]
    declared = {option for topic in topics for option in inspect.get_annotations(topic)}
    assert declared == CASES.keys() | SEEN_ELSEWHERE.keys() | GRPO_NAMES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Parameters that a run ends with; runs with the same options and models are made once."""
    runs = {}

    def train(options, models):
        key = (repr(sorted(options.items())), models)
        if key not in runs:
            trainer = ppo_run(tmp_path_factory.mktemp("option"), models() if models else None, **options)
            runs[key] = snapshot(trainer.model)
        return runs[key]

    return train


@pytest.mark.parametrize("option", CASES)
def test_option_changes_the_trained_models(trained, option):
    shared, value, models = CASES[option]
    shared = {"learning_rate": 1e-2} | shared
    without, with_it = trained(shared, models), trained(shared | {option: value}, models)
    assert any(not torch.equal(tensor, with_it.get(name, torch.zeros(()))) for name, tensor in without.items())


def test_control_the_same_options_give_the_same_models(tmp_path, trained):
    again = ppo_run(tmp_path, learning_rate=1e-2).model
    assert changed(again, trained({"learning_rate": 1e-2}, None)) == set()


def test_sequences_per_scoring_pass_are_an_option(tmp_path):
    sizes = {}
    for size in (64, 3):
        trainer = ppo_trainer(tmp_path, local_rollout_forward_batch_size=size, max_steps=1)
        seen = sizes.setdefault(size, [])
        for model in (trainer.ref_model, trainer.reward_funcs[0].model):
            model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
            )
        trainer.train()
    assert sizes == {64: [4, 4], 3: [3, 1, 3, 1]}


@pytest.mark.parametrize("number, tables", [(0, 0), (1, 1), (2, 2), (10, 4)])
def test_number_of_sample_tables_is_an_option(tmp_path, capsys, number, tables):
    models = {"eval_dataset": tiny.tiny_prompts(2, seed=3)}
    ppo_run(tmp_path, models, total_episodes=16, num_sample_generations=number, num_ppo_epochs=1)
    assert capsys.readouterr().out.count("Samples at step") == tables


def test_prompts_are_checked_in_several_processes(tmp_path, monkeypatch):
    seen = []
    original = Dataset.map

    def note(self, function, *args, num_proc=None, **kwargs):
        seen.append(num_proc)
        return original(self, function, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", note)
    ppo_trainer(tmp_path, dataset_num_proc=2)
    assert seen == [2]


def test_second_training_starts_with_a_rollout_of_its_own(tmp_path):
    trainer = ppo_trainer(tmp_path, max_steps=3, num_ppo_epochs=2, logging_steps=2)
    trainer.train()
    assert trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) != 0, "not in mid-rollout"
    trainer.train()
    first_lines = [line for line in trainer.state.log_history if "loss" in line]
    assert first_lines[0]["policy/ratio_max"] >= 1.0
    assert "reward/score" in first_lines[0]


def test_adapter_as_reward_model_gives_a_merged_critic(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
    trainer = ppo_trainer(tmp_path, {"reward_model": get_peft_model(tiny.tiny_reward_model(), config)}, max_steps=1)
    trainer.train()
    assert not any("lora" in name for name, _ in trainer.critic.named_parameters())
