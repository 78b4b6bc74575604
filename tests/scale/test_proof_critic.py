"""Two processes pretrain the critic that one does, under DDP and under ZeRO-2."""

import json
import subprocess
import sys

import pytest
from datasets import Dataset

import tiny
from cli_runs import flags
from trl_ext.cli.main import main


pytestmark = [pytest.mark.proof, pytest.mark.filterwarnings("ignore")]
# Seven held-out prompts, whose shares of two processes differ.
OPTIONS = {"test_size": 7, "total_episodes": 24, "max_passes": 2, "patience": 2, "per_device_eval_batch_size": 3}
OPTIONS |= {"response_length": 5, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "report_to": "none"}


def test_two_processes_pretrain_the_same_critic(tmp_path):
    paths = tiny.save_tiny(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    Dataset.from_dict({"prompt": tiny.tiny_prompts(80)["prompt"]}).to_json(str(prompts))
    data = {"model": paths["actor"], "reward_model_path": paths["reward_model"], "dataset_name": prompts}
    words = ["critic", *flags(**data | OPTIONS), "--use_cpu"]
    two = flags(output_dir=tmp_path / "ddp", nproc=2, per_device_train_batch_size=2)
    subprocess.run([sys.executable, "-m", "trl_ext.cli", *words, *two], check=True)
    kept = flags(rollouts=tmp_path / "ddp" / "rollouts")
    zero = flags(output_dir=tmp_path / "zero", nproc=2, per_device_train_batch_size=2, accelerate_config="zero2")
    subprocess.run([sys.executable, "-m", "trl_ext.cli", *words, *kept, *zero], check=True)
    main([*words, *kept, *flags(output_dir=tmp_path / "one", per_device_train_batch_size=4)])
    ddp, zero, one = (explained(tmp_path / name) for name in ("ddp", "zero", "one"))
    assert len(one) == 3
    assert len(Dataset.from_parquet(str(tmp_path / "ddp/rollouts/held_out.parquet"))) == 7
    assert ddp == pytest.approx(one, abs=1e-5)
    assert zero == pytest.approx(one, abs=1e-5)


def explained(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return [line["eval_value/explained_variance_mc"] for line in (metrics["before"], *metrics["passes"])]
