"""Errors before anything is loaded, and errors that stop a run."""

import dataclasses
import math
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    ProcessorMixin,
    TrainingArguments,
)

import tiny
from ppo_runs import changed, ppo_trainer, response_lengths, snapshot
from trl_ext import PPOConfigX, PPOTrainerX
from trl_ext.ppo.data import check_prompts


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Configs and tokenizers of actor, reward model and a classifier with two labels. There are no weights."""
    folders = {}
    models = {
        "actor": (tiny.tiny_config(), "LlamaForCausalLM"),
        "reward_model": (tiny.tiny_config(num_labels=1), "LlamaForSequenceClassification"),
        "two_labels": (tiny.tiny_config(num_labels=2), "LlamaForSequenceClassification"),
    }
    for name, (config, architecture) in models.items():
        folder = tmp_path_factory.mktemp(name)
        config.architectures = [architecture]
        config.save_pretrained(folder)
        tiny.tiny_tokenizer().save_pretrained(folder)
        folders[name] = str(folder)
    return folders


def without_eos():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.eos_token = None
    return tokenizer


class TextAndImages(ProcessorMixin):
    """A processor without parts: what is refused is its type."""

    def __init__(self):
        pass


def prompts(**columns):
    return Dataset.from_dict(columns)


LONG = "cat " * 123  # with a response of 6 tokens, one more than the 128 of the tiny models
SAYS_NOTHING = [{"role": "user", "content": ""}]
PROMPT_TUNING = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
ACTIVATED = LoraConfig(alora_invocation_tokens=[6], task_type="CAUSAL_LM")
BEFORE_LOADING = {
    "no model": ({"model": None}, "no model to train: pass `model`, or set `sft_model_path`"),
    "no reward": ({"reward_model": None}, "no reward at all: pass `reward_model`, `reward_funcs`"),
    "tokenizer without eos": ({"processing_class": without_eos()}, "no eos token.* Set `processing_class.eos_token`"),
    "processor": ({"processing_class": TextAndImages()}, "TextAndImages; PPO reads text only"),
    "image column": ({"train_dataset": prompts(prompt=["cat"] * 4, image=[0] * 4)}, "column `image`; PPO reads text"),
    "no dataset": ({"train_dataset": None}, "There are no prompts: pass `train_dataset`"),
    "no prompts": ({"train_dataset": prompts(text=["cat"] * 4)}, "no column 'prompt'; its columns are 'text'"),
    "empty prompt": ({"train_dataset": prompts(prompt=["cat", "", "a", "b"])}, "Row 1 of `train_dataset`"),
    "empty conversation": ({"train_dataset": prompts(prompt=[SAYS_NOTHING] * 4)}, "Row 0 of `train_dataset`"),
    "empty ids": ({"train_dataset": prompts(input_ids=[[7], [7], [], [7]])}, "Row 2 of `train_dataset`"),
    "ids of padding": ({"train_dataset": prompts(input_ids=[[7], [0, 0], [7], [7]])}, "Row 1 of `train_dataset`"),
    "long prompt": (
        {"train_dataset": prompts(prompt=["cat", "cat", "cat", LONG])},
        "prompt of `train_dataset`, in row 3, has 123 tokens; .*_length=6` it needs 129 and does not fit .* 128",
    ),
    "prompt beyond a budget of tokens": (
        {"train_dataset": prompts(prompt=["cat", "cat cat", "cat cat cat", "cat"]), "micro_batch_tokens": 7},
        "in row 2, has 3 tokens; .* fit `micro_batch_tokens` of 7. Set `micro_batch_tokens` to at least 9; or shorten",
    ),
    "prompt beyond both budgets": (
        {"train_dataset": prompts(prompt=["cat"] * 4), "micro_batch_tokens": 6, "score_batch_tokens": 4},
        "fit `micro_batch_tokens` of 6 and `score_batch_tokens` of 4. Set .* and `score_batch_tokens` to at least 7;",
    ),
    "prompt beyond a budget and the context": (
        {"train_dataset": prompts(prompt=["cat", LONG, "cat", "cat"]), "micro_batch_tokens": 40},
        r"the model's context of 128 and `micro_batch_tokens` of 40\. Shorten or remove it",
    ),
    "budget without room for a stream's responses": (
        {"train_dataset": prompts(prompt=["cat"] * 4).to_iterable_dataset(), "score_batch_tokens": 6},
        "`score_batch_tokens=6` tokens has no room .* Set at least 6 and the tokens of your longest prompt",
    ),
    "long held-out prompt": ({"eval_dataset": prompts(prompt=[LONG])}, "`eval_dataset`, in row 0, has 123 tokens"),
    "held-out prompt beyond a budget": (
        {
            "train_dataset": prompts(prompt=["cat"] * 4),
            "eval_dataset": prompts(prompt=["cat cat cat"]),
            "score_batch_tokens": 8,
        },
        "`eval_dataset`, in row 0, .* to at least 9",
    ),
    "empty held-out prompt": ({"eval_dataset": {"b": prompts(prompt=[""])}}, r"Row 0 of `eval_dataset\['b'\]`"),
    "no rows": ({"train_dataset": prompts(prompt=[])}, "`train_dataset` has no rows"),
    "no held-out rows": ({"eval_dataset": prompts(prompt=[])}, "`eval_dataset` has no rows"),
    "stream without prompts": (
        {"train_dataset": prompts(text=["cat"] * 4).to_iterable_dataset()},
        r"`train_dataset` has no column 'prompt'; its columns are 'text'",
    ),
    "few prompts": (
        {"train_dataset": tiny.tiny_prompts(3)},
        "has 3 prompts, and a rollout takes 4: .* set `per_device_train_batch_size=1`",
    ),
    "collator": (
        {"data_collator": DataCollatorWithPadding(tiny.tiny_tokenizer())},
        "`data_collator` collates tokenised prompts, and `train_dataset` has no column `input_ids`",
    ),
    "prompt tuning": ({"peft_config": PROMPT_TUNING}, "PromptTuningConfig learns virtual tokens.* use LoRA"),
    "activated LoRA": ({"peft_config": ACTIVATED}, "activated LoRA .* Leave `alora_invocation_tokens` out"),
    "critic of another kind": ({"value_model": len}, "`value_model` is a builtin_function.*; give a model"),
    "reference of another kind": ({"ref_model": 3}, r"`ref_model` is a int \(3\); give a model, or its path"),
    "reward of another kind": ({"reward_funcs": 3}, r"`reward_funcs` has a int \(3\); give a function"),
    "reward model with two labels": ({"reward_model": "two_labels"}, "two_labels.* has 2 labels"),
    "reward source with two labels": (
        {"reward_model": None, "reward_funcs": "two_labels"},
        "two_labels.* has 2 labels",
    ),
    "critic with two labels": ({"value_model": "two_labels"}, "value model has 2 labels; a state has one value"),
    "reward model as actor": ({"model": "reward_model"}, "LlamaForSequenceClassification, which scores text"),
    "reward model as reference": ({"ref_model": "reward_model"}, "LlamaForSequenceClassification, which scores text"),
    "actor as reward model": ({"reward_model": "actor"}, "whose score head would be untrained"),
    "critic twice": ({"value_model": "somewhere", "critic": "head"}, "`critic='head'` .* remove `value_model`"),
    "adapter of no adapter": ({"ref_adapter_name": "sft"}, "`ref_adapter_name=.sft.` must be an adapter"),
}


def test_sequence_of_a_stream_beyond_a_budget_stops_the_run(tmp_path):
    stream = {"train_dataset": prompts(prompt=["cat", "cat cat cat"] * 8).to_iterable_dataset()}
    trainer = ppo_trainer(tmp_path, stream, micro_batch_tokens=8, max_steps=1, num_sample_generations=0)
    with pytest.raises(ValueError, match=r"`micro_batch_tokens=8` tokens has no room for .* 'cat cat cat'"):
        trainer.train()


def test_held_out_sequence_of_a_stream_beyond_a_budget_stops_the_evaluation(tmp_path):
    stream = {"eval_dataset": prompts(prompt=["cat", "cat cat cat"]).to_iterable_dataset()}
    stream["train_dataset"] = prompts(prompt=["cat"] * 8)
    trainer = ppo_trainer(tmp_path, stream, score_batch_tokens=8, per_device_eval_batch_size=2)
    with pytest.raises(ValueError, match=r"`score_batch_tokens=8` tokens has no room for .* 'cat cat cat'"):
        trainer.evaluate()


@pytest.mark.parametrize("case", BEFORE_LOADING)
def test_error_comes_before_any_weights_are_loaded(tmp_path, paths, case):
    """The folders hold no weights: loading them would fail with another error."""
    arguments, message = BEFORE_LOADING[case]
    arguments = {"model": "actor", "reward_model": "reward_model"} | arguments
    arguments = {name: paths.get(v, v) if isinstance(v, str) else v for name, v in arguments.items()}
    options = {name: arguments.pop(name) for name in {*arguments} & {f.name for f in dataclasses.fields(PPOConfigX)}}
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, arguments, **options)


def test_control_folders_without_weights_pass_the_checks_and_fail_to_load(tmp_path, paths):
    with pytest.raises(OSError, match="no file named"):
        ppo_trainer(tmp_path, {"model": paths["actor"], "reward_model": paths["reward_model"]})


@pytest.mark.parametrize("role", ["ref_model", "value_model", "reward_model", "reward_funcs"])
def test_folder_with_an_adapter_alone_is_refused_with_a_way_out(tmp_path, paths, role):
    folder = tmp_path / "adapter"
    get_peft_model(tiny.tiny_actor(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    arguments = {"model": paths["actor"], "reward_model": paths["reward_model"]} | {role: str(folder)}
    with pytest.raises(ValueError, match=r"holds an adapter without its base model.*trl-ext merge"):
        ppo_trainer(tmp_path, arguments)


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def classifier(labels):
    return AutoModelForSequenceClassification.from_config(tiny.tiny_config(num_labels=labels))


def spoilt(model):
    model.model.norm.weight.data.fill_(math.nan)
    return model


def one_for(*roles):
    return dict.fromkeys(roles, tiny.tiny_actor() if "model" in roles else tiny.tiny_reward_model())


def adapter_twice():
    return {"model": get_peft_model(tiny.tiny_actor(), LORA), "peft_config": LORA}


def with_optimizer_of_the_actor():
    actor = tiny.tiny_actor()
    return {"model": actor, "optimizers": (torch.optim.AdamW(actor.parameters(), lr=1e-3), None)}


# Models in memory, made by each test, and what the error says.
IN_MEMORY = {
    "actor as its own reference": (lambda: one_for("model", "ref_model"), "`ref_model` is the `model` object itself"),
    "actor as its own critic": (lambda: one_for("model", "value_model"), "`value_model` is the `model` object itself"),
    "reward model as critic": (
        lambda: one_for("reward_model", "value_model"),
        "`value_model` is the `reward_model` object itself",
    ),
    "reward model with two labels": (lambda: {"reward_model": classifier(2)}, "reward model .* has 2 labels"),
    "critic with three labels": (lambda: {"value_model": classifier(3)}, "value model has 3 labels; a state has one"),
    "critic without a score head": (
        lambda: {"value_model": tiny.tiny_actor(1)},
        "LlamaForCausalLM, which writes text",
    ),
    "critic that gives NaN": (lambda: {"value_model": spoilt(tiny.tiny_reward_model(5))}, "critic.* gives NaN before"),
    "actor that gives NaN": (lambda: {"model": spoilt(tiny.tiny_actor())}, r"\(`model`\) gives NaN before"),
    "optimizer without the critic": (with_optimizer_of_the_actor, "does not hold 21 of the critic's 21"),
    "adapter twice": (adapter_twice, "`PeftModel` instance together with a `peft_config`"),
    "one tokenizer for two sources": (
        lambda: {"reward_funcs": [response_lengths], "reward_processing_classes": [None]},
        "1 `reward_processing_classes` for 2 reward sources",
    ),
}


@pytest.mark.parametrize("case", IN_MEMORY)
def test_models_that_cannot_make_a_run_are_refused_by_name(tmp_path, case):
    make, message = IN_MEMORY[case]
    with pytest.raises(ValueError, match=message):
        ppo_trainer(tmp_path, make())


def test_conversation_with_an_image_part_is_refused_by_name():
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]
    with pytest.raises(ValueError, match="part of type 'image'; PPO reads text only"):
        check_prompts(Dataset.from_list([{"prompt": prompt}]), "train_dataset", tiny.tiny_tokenizer(), {}, 8)


def test_held_out_prompt_that_no_scoring_pass_reads_may_exceed_its_budget(tmp_path):
    data = {"train_dataset": prompts(prompt=["cat"] * 4), "eval_dataset": prompts(prompt=["cat cat cat"])}
    ppo_trainer(tmp_path, data, score_batch_tokens=8, kl_coef=0.0, critic="head", per_device_eval_batch_size=1)


def test_longest_prompt_that_fits_is_accepted(tmp_path):
    ppo_trainer(tmp_path, {"train_dataset": prompts(prompt=["cat " * 122] * 4)})


def test_config_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(TypeError, match="`args` is a TrainingArguments; PPOTrainerX needs a `PPOConfigX`"):
        PPOTrainerX(TrainingArguments(tmp_path, report_to="none"), model=tiny.tiny_actor())


# --- at run time


def judge(value):
    def judge(completions, **kwargs):
        return [0.5] + [value] * (len(completions) - 1)

    return judge


async def async_judge(completions, **kwargs):
    return [math.nan] * len(completions)


@pytest.mark.parametrize(
    "function, name, value",
    [
        (judge(math.nan), "judge", "nan"),
        (judge(10**400), "judge", "inf"),
        (judge(-math.inf), "judge", "-inf"),
        (async_judge, "async_judge", "nan"),
    ],
)
def test_reward_function_that_is_not_finite_stops_the_run_and_is_named(tmp_path, function, name, value):
    trainer = ppo_trainer(tmp_path, {"reward_model": None, "reward_funcs": [response_lengths, function]})
    with pytest.raises(FloatingPointError, match=rf"The reward '{name}' is {value} at step 0 for prompt '.+', resp"):
        trainer.train()


@pytest.mark.parametrize("own_tokenizer, value", [(False, math.nan), (True, math.inf)])
def test_reward_model_that_is_not_finite_stops_the_run_and_is_named(tmp_path, own_tokenizer, value):
    reward_model = tiny.tiny_reward_model(vocab_size=80)
    reward_model.config._name_or_path = "hub/cracked"
    tokenizer = tiny.tiny_tokenizer()
    if own_tokenizer:
        tokenizer.add_tokens(["zebra"])
    reward_model.score.register_forward_hook(lambda module, args, output: output * value)
    trainer = ppo_trainer(
        tmp_path, {"reward_model": reward_model, "reward_processing_classes": [tokenizer]}, critic="head"
    )
    with pytest.raises(FloatingPointError, match=r"'cracked' is -?(nan|inf) at step 0 for prompt '.+', response"):
        trainer.train()


def at_step(trainer, step):
    """Return whether the trainer is in the backward pass of this optimizer step."""
    return torch.is_grad_enabled() and trainer.model.training and trainer.state.global_step == step


def assert_only_the_first_checkpoint_is_there(folder):
    assert {path.name for path in folder.iterdir()} == {"README.md", "checkpoint-1"}
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint-1")
    AutoModelForSequenceClassification.from_pretrained(folder / "checkpoint-1" / "critic")


def stopped(trainer):
    """Train until the error; return its text and the parameters after the first optimizer step."""
    kept = {}
    step = trainer._save_checkpoint

    def keep(*args, **kwargs):
        kept.update(snapshot(trainer.model))
        step(*args, **kwargs)

    trainer._save_checkpoint = keep
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    return str(error.value), kept


def test_value_loss_that_is_not_finite_stops_the_run_with_step_term_and_sample(tmp_path):
    trainer = ppo_trainer(tmp_path, save_strategy="steps", save_steps=1)

    def poison(module, args, output):
        return output * math.nan if at_step(trainer, 1) else output

    trainer.critic.model.score.register_forward_hook(poison)
    message, kept = stopped(trainer)
    assert "The loss is nan at step 1; not finite: value_loss. First in the response with token ids [" in message
    assert changed(trainer.model, kept) == set()
    assert_only_the_first_checkpoint_is_there(tmp_path)


def test_policy_loss_that_is_not_finite_names_the_sample_that_did_it(tmp_path):
    trainer = ppo_trainer(tmp_path, save_strategy="steps", save_steps=1, packing=False)  # a row per response
    poisoned = []

    def poison(module, args, output):
        if not at_step(trainer, 1) or poisoned:
            return output
        rollout = trainer.run_state.rollout
        (batch,) = trainer.run_state.micro_batches[trainer._step % trainer.args.steps_per_generation]
        poisoned.append(rollout.response_ids[batch.rows[1]].tolist())
        output[1] = math.nan
        return output

    trainer.model.model.norm.register_forward_hook(poison)
    message, kept = stopped(trainer)
    assert "at step 1; not finite: clip_objective, kl, entropy, old_kl" in message
    assert f"First in the response with token ids {poisoned[0]}." in message
    assert changed(trainer.model, kept) == set()
    assert_only_the_first_checkpoint_is_there(tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"kl_placement": "reward"}, {"kl_estimator": "full"}], ids=["loss", "reward", "full"]
)
def test_reference_that_gives_nan_is_named_and_the_learning_rate_is_not_blamed(tmp_path, options):
    trainer = ppo_trainer(tmp_path, {"ref_model": tiny.tiny_actor(5)}, **options)
    spoilt(trainer.ref_model)
    said = "The reference model gives log-probabilities that are not finite at step 0: nan in the response with token"
    with pytest.raises(FloatingPointError, match=said) as error:
        trainer.train()
    assert "learning rate" not in str(error.value)


@pytest.mark.parametrize("step, cure", [(0, "It has not been trained here"), (2, "Lower the learning rate")])
@pytest.mark.parametrize("role", ["actor gives probabilities", "critic gives values"])
def test_model_that_gives_nan_is_named(tmp_path, role, step, cure):
    """The actor while it samples, the critic while it scores."""
    trainer = ppo_trainer(tmp_path)
    head = trainer.model.lm_head if role.startswith("actor") else trainer.critic.model.score
    head.register_forward_hook(
        lambda module, args, output: output * math.nan if trainer.state.global_step == step else output
    )
    with pytest.raises(FloatingPointError, match=rf"The {role} .* at step {step}.* {cure}"):
        trainer.train()


@pytest.mark.parametrize(
    "value, max_grad_norm, where",
    [
        (math.nan, 1.0, "every parameter"),  # scaling by a norm of nan spreads it
        (math.nan, 0.0, "every parameter"),  # also when gradients are not clipped
        (math.inf, 1.0, "critic.model.score.weight"),
    ],
)
def test_gradient_that_is_not_finite_stops_the_run(tmp_path, value, max_grad_norm, where):
    trainer = ppo_trainer(tmp_path, save_strategy="steps", save_steps=1, max_grad_norm=max_grad_norm)

    def poison(gradient):
        return torch.full_like(gradient, value) if trainer.state.global_step == 1 else gradient

    trainer.critic.model.score.weight.register_hook(poison)
    message, kept = stopped(trainer)
    assert f"The gradient norm is {value} at step 1; not finite in {where}. Nothing was updated." in message
    assert changed(trainer.model, kept) == set()
    assert_only_the_first_checkpoint_is_there(tmp_path)


def test_critic_of_an_infinite_loss_is_named_in_a_run_without_checkpoints(tmp_path):
    trainer = ppo_trainer(
        tmp_path, {"reward_model": None, "reward_funcs": lambda completions, **_: [1e30] * len(completions)}
    )
    with pytest.raises(FloatingPointError, match="The loss is inf at step 0; not finite: value_loss"):
        trainer.train()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("values", [[1, 2, 3, 4], [True] * 4, [["a", "b"]] * 4, [{"a": "b"}] * 4, [[7, 8]] * 4])
def test_prompts_of_another_kind_start_when_the_advice_is_followed_to_the_letter(tmp_path, values):
    dataset = prompts(prompt=values)
    with pytest.raises(ValueError, match="The column 'prompt' of `train_dataset` holds") as error:
        ppo_trainer(tmp_path, {"train_dataset": dataset})
    (advice,) = re.findall(r"`(dataset\..*)`", str(error.value))
    ppo_trainer(tmp_path, {"train_dataset": eval(advice, {"dataset": dataset})})
