"""What runs of PPO and DPO have logged, and the files they leave, written by hand."""

import json
import struct

from datasets import Dataset


PPO_LOG = [
    {"step": 0, "eval_reward/score": 0.0, "eval_reward/score_ci95": 0.3, "eval_kl/ref": 0.0},
    {
        "step": 1,
        "loss": -0.4 + 0.2 * 0.5 + 0.5 * 2.0 - 0.01 * 3.0,
        "terms/clip_objective": 0.4,
        "terms/kl": 0.5,
        "coef/kl": 0.2,
        "terms/value_loss": 2.0,
        "coef/vf": 0.5,
        "terms/entropy": 3.0,
        "coef/entropy": 0.01,
        "terms/old_kl": 0.1,
        "coef/old_kl": 0.0,
        "reward/score": 0.1,
        "kl/ref": 0.2,
    },
    {
        "step": 2,
        "loss": -0.1 + 0.4 * 0.25 + 0.5 * 1.0 - 0.01 * 2.0,
        "terms/clip_objective": 0.1,
        "terms/kl": 0.25,
        "coef/kl": 0.4,
        "terms/value_loss": 1.0,
        "coef/vf": 0.5,
        "terms/entropy": 2.0,
        "coef/entropy": 0.01,
        "terms/old_kl": 0.2,
        "coef/old_kl": 0.0,
    },
    {"step": 2, "eval_reward/score": 1.0, "eval_reward/score_ci95": 0.4, "eval_kl/ref": 0.9},
    {"step": 2, "train_runtime": 1.0},
]


def dpo_line(step, prefix="", margin=1.0, **others):
    """A log line of DPO: every pair has the margin `margin`, half of it from each side."""
    metrics = {
        "loss": 0.5,
        "preference/accuracy": 0.75 if margin else 0.0,
        "preference/accuracy_low": 0.5,
        "preference/accuracy_high": 0.875,
        "preference/pairs": 128.0,
        "preference/accuracy/a|b": 0.5,
        "preference/calibration_error": 0.25,
        "rewards/chosen": margin / 2,
        "rewards/rejected": -margin / 2,
        "rewards/chosen_std": 0.125,
        "rewards/rejected_std": 0.25,
        "rewards/margins": margin,
        "rewards/margins_p10": margin,
        "rewards/margins_p50": margin,
        "rewards/margins_p90": margin,
        "logps/chosen_drift": margin * 5,
        "logps/rejected_drift": -margin * 5,
    }
    return {"step": step} | {prefix + key: value for key, value in (metrics | others).items()}


DPO_LOG = [
    dpo_line(0, "eval_", 0.0),
    dpo_line(1, margin=0.0),
    dpo_line(2),
    dpo_line(2, "eval_"),
    {"step": 2, "x": 1.0},
]


def png_size(path):
    """Width and height from the file's header."""
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", header[16:24])


def write_completions(folder, step, rows):
    columns = ["prompt", "completion", "score", "advantage"]
    table = {name: [row[i] for row in rows] for i, name in enumerate(columns)} | {"step": [step] * len(rows)}
    Dataset.from_dict(table).to_parquet(str(folder / f"completions_{step:05d}.parquet"))


def run_folder(folder, log, **state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(
        json.dumps({"log_history": log, "global_step": 2, "max_steps": 2} | state), encoding="utf-8"
    )
    return folder
