"""What the pages list is what there is: keys of the logs in docs/metrics.md, options of DPO, callbacks, panels."""

import dataclasses
import re
from pathlib import Path

import pytest
from datasets import Dataset
from trl import DPOConfig

import tiny
import trl_ext
import vllm_rows
from ppo_runs import ppo_run
from trl_ext import CriticConfigX, CriticTrainerX, DPOConfigX, DPOTrainerX, RewardConfigX, RewardTrainerX
from trl_ext.report.policy_panels import POLICY


# Of TRL and transformers, on the way through a run.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

SPEED = ("runtime", "samples_per_second", "steps_per_second")
FROM_THE_TRAINER = {
    *("grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_loss"),
    *(f"{when}_{what}" for when in ("train", "eval") for what in SPEED),
}
ONLY_WITH_VLLM = {
    *(f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max")),
    *(f"sampling/importance_sampling_ratio/{which}" for which in ("min", "mean", "max")),
    *("sampling/rollout_lag", "time/server_wait", "time/server_idle", "time/reward_wait"),
}
ONLY_WITH_TOOLS = {"tools/call_frequency", "tools/failure_frequency"}


def read(name):
    return (Path(__file__).resolve().parents[2] / "docs" / name).read_text(encoding="utf-8")


def documented(title=None):
    """The keys that open a row, of a section or of what stands before the first one that is not PPO's."""
    text = read("metrics.md")
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0] if title else text.split("\n## DPO\n")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(rows) == len(set(rows))
    return set(rows)


def logged(*trainers):
    """The keys of all lines but the Trainer's own, with the names of sources left open."""
    keys = {key for trainer in trainers for line in trainer.state.log_history for key in line}
    keys = {re.sub(r"(preference/(?:accuracy|pairs))/\w+", r"\1/<source>", key) for key in keys - FROM_THE_TRAINER}
    return {re.sub(r"rewards/\w+/", "rewards/<source>/", key) for key in keys}


def test_keys_of_ppo_are_those_of_the_page(tmp_path):
    held_out = {"eval_dataset": tiny.tiny_prompts(3, seed=3)}
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    imitating = {"positive_nll_coef": 0.1, "positive_min_score": 0.0}
    keys = logged(
        ppo_run(tmp_path, held_out, target_kl=1.0, num_sample_generations=0, **evaluation),
        ppo_run(
            tmp_path,
            held_out,
            num_generations=2,
            num_generations_eval=2,
            critic_gate=True,
            critic_warmup_until=0.9,
            **imitating,
            **evaluation,
        ),
        ppo_run(tmp_path, {"model": tiny.tiny_mixture()}, max_steps=1, response_length=60),  # some responses end
    )
    # A held-out metric has the name of its training twin, unless it has a row of its own.
    rows = documented()
    without_row = {key for key in keys if key.startswith("eval_")} - rows
    assert {key.removeprefix("eval_") for key in without_row} <= rows
    assert keys - without_row == rows - ONLY_WITH_VLLM - ONLY_WITH_TOOLS


def of_pairs(trainer_class, config_class, folder, model, **more):
    """A run of two steps on pairs, which are also held out."""
    rows = [
        {"prompt": "the", "chosen": f" good {text}", "rejected": " bad film" * (1 + i % 3), "source": "ab"[i % 2]}
        for i, text in enumerate(tiny.tiny_prompts(8)["prompt"])
    ]
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none"}
    options |= {"bf16": False, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"} | more
    pairs = Dataset.from_list(rows)
    trainer = trainer_class(model, args=config_class(str(folder), **options), train_dataset=pairs, eval_dataset=pairs)
    trainer.train()
    return trainer


def check(keys, rows, only_in_training=()):
    """Every key is documented and every documented key is logged, in training and in an evaluation."""
    with_a_row = {row for row in rows if row.startswith("eval_")}
    assert with_a_row <= keys
    keys, rows = keys - with_a_row, rows - with_a_row
    assert {key for key in keys if not key.startswith("eval_")} == rows
    of_evaluation = {key for key in rows if not key.startswith(only_in_training)}
    assert {key.removeprefix("eval_") for key in keys if key.startswith("eval_")} == of_evaluation


def test_keys_of_dpo_are_those_of_the_page(tmp_path):
    experts = str(tmp_path / "experts")
    tiny.tiny_mixture().save_pretrained(experts)
    tiny.tiny_tokenizer().save_pretrained(experts)
    actor = tiny.save_tiny(tmp_path)["actor"]
    keys = logged(
        of_pairs(DPOTrainerX, DPOConfigX, tmp_path / "all", actor, precompute_ref_log_probs=True),
        of_pairs(DPOTrainerX, DPOConfigX, tmp_path / "auxiliary", experts),
    )
    check(keys, documented("DPO"), ("time/", "memory/", "tokens_per_second"))


def test_keys_of_a_reward_run_are_those_of_the_page(tmp_path):
    model = tiny.save_tiny(tmp_path)["reward_model"]
    check(logged(of_pairs(RewardTrainerX, RewardConfigX, tmp_path / "out", model)), documented("Reward models"))


def test_keys_of_a_critics_pretraining_are_those_of_the_page(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 1, "logging_steps": 1}
    args = CriticConfigX(str(tmp_path), max_passes=1, response_length=4, report_to="none", bf16=False, **sizes)
    models = {"model": tiny.tiny_actor(), "reward_model": tiny.tiny_reward_model()}
    models |= {"processing_class": tiny.tiny_tokenizer()}
    prompts = {"train_dataset": tiny.tiny_prompts(8), "eval_dataset": tiny.tiny_prompts(4, seed=3)}
    trainer = CriticTrainerX(args, **models, **prompts)
    trainer.train()
    keys, rows = logged(trainer), documented("Value pretraining")
    assert rows <= keys
    assert {key.removeprefix("eval_") for key in keys - rows} <= documented()


def test_options_of_dpo_beyond_trls_are_on_the_page():
    added = {field.name for field in dataclasses.fields(DPOConfigX)} - {
        field.name for field in dataclasses.fields(DPOConfig)
    }
    assert set(re.findall(r"^\| `([^`]+)` \|", read("dpo.md"), flags=re.MULTILINE)) == added | {"label_smoothing"}


def test_every_callback_is_on_the_page():
    rows = re.findall(r"^\| `(\w+Callback)` \|", read("callbacks.md"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(name for name in trl_ext.__all__ if name.endswith("Callback"))


def test_every_panel_key_is_documented():
    """What the report looks for in a log stands in docs/metrics.md, or is TRL's own for GRPO."""
    of_trl = {"kl", "reward", "entropy", "clip_ratio/region_mean", "learning_rate", "grad_norm"}
    keys = {key for panel in POLICY for key in panel.keys if not key.endswith("/")} - of_trl
    assert {key for key in keys if f"| `{key}` |" not in read("metrics.md")} == set()


def test_table_of_vllm_has_the_rows_that_are_measured():
    lines = read("vllm.md").partition(vllm_rows.HEADING)[2].splitlines()
    cells = [line.split(" | ")[:2] for line in lines if line.startswith("|")]
    assert [[where.removeprefix("| "), text] for where, text in cells] == [
        [vllm_rows.WHERE[row.group], row.text] for row in vllm_rows.ROWS
    ]
