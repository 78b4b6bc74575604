"""`trl-ext reward` trains what `trl.RewardTrainer` trains: the same losses and weights, in float32 and in 16 bits."""

import json

import pytest
import torch
from transformers import AutoTokenizer, set_seed
from trl import RewardConfig, RewardTrainer

import dpo_runs
import tiny
from trl_ext.cli.commands import reward


pytestmark = pytest.mark.integration

SETTINGS = {"learning_rate": 1e-2, "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
SETTINGS |= {
    "disable_tqdm": True,
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "center_rewards_coefficient": 0.1,
}


def trained(trainer):
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("bf16, dtype", [(False, "float32"), (True, "float32"), (True, "bfloat16")])
def test_reward_command_equals_trls_trainer(tmp_path, bf16, dtype):
    model, pairs = tmp_path / "model", tmp_path / "pairs.jsonl"
    tiny.tiny_reward_model().save_pretrained(model)
    tiny.tiny_tokenizer().save_pretrained(model)
    pairs.write_text("".join(json.dumps(row) + "\n" for row in dpo_runs.tiny_pairs(12)), encoding="utf-8")
    flags = [word for name, value in (SETTINGS | {"bf16": bf16}).items() for word in (f"--{name}", str(value))]
    given = ["--model", str(model), "--dtype", dtype, "--dataset_name", str(pairs), "--test_size", "4"]
    data, options, args = reward.COMMAND.options([*given, "--output_dir", str(tmp_path / "ours"), *flags]).make()
    set_seed(args.seed)
    ours = reward.COMMAND.build(data, options, args)
    set_seed(args.seed)
    theirs = RewardTrainer(
        str(model),
        RewardConfig(str(tmp_path / "theirs"), bf16=bf16, model_init_kwargs={"dtype": dtype}, **SETTINGS),
        train_dataset=reward.load_pairs(data)["train"],
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    assert theirs.model.dtype == getattr(torch, dtype)
    (losses, weights), (expected, expected_weights) = trained(ours), trained(theirs)
    assert losses == expected
    assert len(losses) == 2
    assert all((weights[name] == each).all() for name, each in expected_weights.items())
