"""A script written for TRL 1.12's `PPOTrainer` runs with only its import changed."""

import inspect
import math
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import tiny
from ppo_runs import log_lines, logged, sum_of_terms
from trl_ext import PPOTrainerX


# The constructor of TRL 1.12's PPOTrainer (trl/experimental/ppo/ppo_trainer.py).
CONSTRUCTOR = (
    "args processing_class model ref_model reward_model train_dataset value_model data_collator eval_dataset "
    "optimizers callbacks peft_config"
).split()
NEW = "reward_funcs reward_processing_classes quantization_config tools rollout_func environment_factory".split()

OLD_IMPORT = "from trl.experimental.ppo import PPOConfig, PPOTrainer"
NEW_IMPORT = "from trl_ext import PPOConfigX as PPOConfig, PPOTrainerX as PPOTrainer"

# After TRL 1.12's examples/scripts/ppo/ppo.py: command line, model objects, a pad token added to the tokenizer, token
# ids made before training, LoRA, a held-out set.
SCRIPT = """
import shutil

import torch
from accelerate import PartialState
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.experimental.ppo import PPOConfig, PPOTrainer


if __name__ == "__main__":
    parser = HfArgumentParser((ScriptArguments, PPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_into_dataclasses()
    # remove output_dir if exists
    shutil.rmtree(training_args.output_dir, ignore_errors=True)

    dtype = model_args.dtype if model_args.dtype in ["auto", None] else getattr(torch, model_args.dtype)
    attention = model_args.attn_implementation
    model_kwargs = dict(revision=model_args.model_revision, attn_implementation=attention, dtype=dtype)
    quantization_config = get_quantization_config(model_args)
    if quantization_config is not None:
        model_kwargs["quantization_config"] = quantization_config

    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    value_model = AutoModelForSequenceClassification.from_pretrained(
        training_args.reward_model_path, num_labels=1, **model_kwargs
    )
    reward_model = AutoModelForSequenceClassification.from_pretrained(
        training_args.reward_model_path, num_labels=1, **model_kwargs
    )
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **model_kwargs)

    peft_config = get_peft_config(model_args)
    if peft_config is None:
        ref_policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **model_kwargs)
    else:
        ref_policy = None

    dataset = load_dataset("json", data_files=script_args.dataset_name, split=script_args.dataset_train_split)
    eval_samples = 4
    train_dataset = dataset.select(range(len(dataset) - eval_samples))
    eval_dataset = dataset.select(range(len(dataset) - eval_samples, len(dataset)))
    dataset_text_field = "prompt"

    def prepare_dataset(dataset, tokenizer):
        def tokenize(element):
            outputs = tokenizer(element[dataset_text_field], padding=False)
            return {"input_ids": outputs["input_ids"]}

        columns = dataset.column_names
        return dataset.map(tokenize, batched=True, remove_columns=columns, num_proc=training_args.dataset_num_proc)

    with PartialState().local_main_process_first():
        train_dataset = prepare_dataset(train_dataset, tokenizer)
        eval_dataset = prepare_dataset(eval_dataset, tokenizer)

    trainer = PPOTrainer(
        training_args,
        tokenizer,
        policy,
        ref_policy,
        reward_model,
        train_dataset,
        value_model,
        None,
        eval_dataset,
        peft_config=peft_config,
    )
    trainer.train()

    # Save and push to Hub
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)

    trainer.generate_completions()
"""

FLAGS = """
    --num_ppo_epochs 2 --num_mini_batches 2 --learning_rate 1e-3 --per_device_train_batch_size 2
    --gradient_accumulation_steps 2 --total_episodes 12 --local_rollout_forward_batch_size 3 --response_length 8
    --missing_eos_penalty 1.0 --stop_token eos --whiten_rewards True --temperature 0.7 --vf_coef 0.1 --kl_coef 0.05
    --cliprange 0.2 --cliprange_value 0.2 --gamma 1.0 --lam 0.95 --num_sample_generations 2 --logging_steps 1
    --ds3_gather_for_generation True --report_to none --save_strategy no --eval_strategy steps --eval_steps 4
    --per_device_eval_batch_size 2 --disable_tqdm True
""".split()
LORA = "--use_peft --lora_r 4 --lora_alpha 16 --lora_dropout 0.1 --lora_target_modules q_proj v_proj".split()


def test_constructor_has_trl112s_names_in_its_order_then_keywords():
    parameters = list(inspect.signature(PPOTrainerX.__init__).parameters.values())[1:]
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == CONSTRUCTOR
    assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == NEW
    assert all(p.default is not p.empty for p in parameters)


def run_script(monkeypatch, folder, *flags):
    """Runs the script with only its import changed; returns what it has left in its names."""
    assert SCRIPT.count(OLD_IMPORT) == 1
    script = SCRIPT.replace(OLD_IMPORT, NEW_IMPORT)
    paths = tiny.save_tiny(folder)
    data = folder / "prompts.jsonl"
    tiny.tiny_prompts(20).to_json(data)
    places = ["--dataset_name", str(data), "--output_dir", str(folder / "output"), "--dtype", "float32"]
    models = ["--model_name_or_path", paths["actor"], "--sft_model_path", paths["actor"]]
    models += ["--reward_model_path", paths["reward_model"]]
    monkeypatch.setattr(sys, "argv", ["ppo.py", *places, *models, *FLAGS, *flags])
    names = {"__name__": "__main__"}
    exec(compile(script, "ppo.py", "exec"), names)
    return names


@pytest.mark.parametrize("flags", [LORA, []], ids=["lora", "full"])
def test_script_for_trl112_runs_with_only_its_import_changed(monkeypatch, tmp_path, capsys, flags):
    names = run_script(monkeypatch, tmp_path, *flags)
    trainer = names["trainer"]
    # 3 rollouts of 4 prompts, 2 epochs of 2 mini-batches each
    assert trainer.state.global_step == 12
    lines = log_lines(trainer)
    assert len(lines) == 12
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["loss"] == pytest.approx(sum_of_terms(line), abs=1e-5) for line in lines)
    assert logged(trainer, "kl/ref")[0] == 0.0
    # The reward model has read ids, end token and all, though only the actor's tokenizer has "[PAD]".
    assert hasattr(trainer.reward_funcs[0], "pad_token_id")
    # The user's models are in their roles: the value model has learned, the reward model has not.
    assert trainer.critic.model is names["value_model"]
    start = tiny.tiny_reward_model()
    assert not torch.equal(names["value_model"].score.weight, start.score.weight)
    assert torch.equal(names["reward_model"].score.weight, start.score.weight)
    assert len(logged(trainer, "eval_reward/score")) == 3
    output = capsys.readouterr().out
    assert (
        output.count("Samples at step") == 3 + 2
    )  # before each of three rollouts, and every held-out batch at the end
    saved = tmp_path / "output"
    AutoModelForSequenceClassification.from_pretrained(saved / "critic")
    if flags:
        PeftModel.from_pretrained(tiny.tiny_actor(), saved)
        assert all("lora_" in name for name in load_file(saved / "adapter_model.safetensors"))
    else:
        assert set(load_file(saved / "model.safetensors")) == set(tiny.tiny_actor().state_dict())
