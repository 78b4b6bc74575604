"""
Check that a change moves no number: twelve tiny runs by two commits, log line by log line and weight by weight.

    python tests/golden.py main~5            # an older commit against the working tree
    python tests/golden.py main~5 --demo     # and the first four steps of both demo recipes, on the embedded model

Both sides run on this machine, one after the other; nothing is kept, since floating point differs between processors.
Keys that only the working tree logs are not compared.
The runs know nothing of the package but its public names.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


ROOT = Path(__file__).resolve().parent.parent
HELPERS = [str(path) for path in (ROOT / "tests" / "helpers", ROOT / "tests") if path.is_dir()]
# Log keys that tell of times, memory and the machine.
OF_THE_MACHINE = re.compile(r"(^|[/_])(runtime|time|seconds|memory|flos|step_time)|per_second|^phase")

TINY = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def ppo(folder: str, models: dict[str, Any] | None = None, **options: Any) -> Any:
    """Two rollouts of 4 prompts, learned from in 2 epochs of micro-batches of 2."""
    import tiny
    from trl_ext import PPOConfigX, PPOTrainerX

    rollouts = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_ppo_epochs": 2,
        "response_length": 6,
        "total_episodes": 8,
        "bf16": False,
    }
    given = {
        "processing_class": tiny.tiny_tokenizer(),
        "model": tiny.tiny_actor(),
        "reward_model": tiny.tiny_reward_model(),
        "train_dataset": tiny.tiny_prompts(16),
        "eval_dataset": tiny.tiny_prompts(3, seed=3),
    }
    args = PPOConfigX(output_dir=folder, **(TINY | rollouts | {"num_sample_generations": 0} | options))
    return PPOTrainerX(args, **(given | (models or {})))


def dpo(folder: str, models: dict[str, Any] | None = None, **options: Any) -> Any:
    """Three steps of 4 pairs."""
    from datasets import Dataset

    import tiny
    from trl_ext import DPOConfigX, DPOTrainerX

    prompts = [text + " " for text in tiny.tiny_prompts(12)["prompt"]]
    answers = tiny.tiny_prompts(24, seed=5)["prompt"]
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": answers[:12], "rejected": answers[12:]})
    given = {
        "model": tiny.tiny_actor(),
        "processing_class": tiny.tiny_tokenizer(),
        "train_dataset": pairs,
        "eval_dataset": pairs.select(range(5)),
    }
    batches = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "max_steps": 3, "bf16": False}
    return DPOTrainerX(args=DPOConfigX(output_dir=folder, **(TINY | batches | options)), **(given | (models or {})))


def reward(folder: str) -> Any:
    """Three steps of the command's own way to train a reward model, on pairs of text."""
    import tiny
    from trl_ext.cli.main import main

    path = Path(folder)
    tiny.tiny_actor().save_pretrained(path / "start")
    tiny.tiny_tokenizer().save_pretrained(path / "start")
    answers = tiny.tiny_prompts(24, seed=5)["prompt"]
    rows = [json.dumps({"chosen": a, "rejected": b}) for a, b in zip(answers[:12], answers[12:], strict=True)]
    (path / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    options = {
        "model": path / "start",
        "dataset_name": path / "pairs.jsonl",
        "output_dir": path / "out",
        "max_steps": 3,
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    flags += ["--report_to", "none", "--logging_steps", "1", "--bf16", "False", "--test_size", "4"]
    main(["reward", *flags, *in_padded_rows()])
    return path / "out"


def in_padded_rows() -> list[str]:
    """Return the flags of a reward run that computes as commits do that pack no pairs."""
    import trl_ext

    return ["--packing", "False"] if "RewardConfigX" in trl_ext.__all__ else []


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def with_environment(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
    """A rollout function whose responses hold tokens of an environment, which count for nothing."""
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    return {
        "prompt_ids": ids,
        "completion_ids": [[10, 11, 12 + row, 13, 2] for row in range(len(ids))],
        "logprobs": [[-1.0] * 5 for _ in ids],
        "env_mask": [[1, 0, 0, 1, 1]] * len(ids),
    }


RUNS: dict[str, Callable[[str], Any]] = {
    "ppo, critic model, KL in the reward": lambda folder: ppo(
        folder, kl_placement="reward", kl_controller="proportional", kl_target=0.5, kl_horizon=10
    ),
    "ppo, critic head, KL k2 in the loss, band": lambda folder: ppo(
        folder, critic="head", kl_controller="band", critic_learning_rate=1e-2, critic_warmup_steps=1
    ),
    "ppo, critic adapter on LoRA, exact KL": lambda folder: ppo(
        folder,
        {"peft_config": lora(), "reward_model": None, "reward_funcs": words},
        critic="adapter",
        kl_estimator="full",
    ),
    "ppo, LoRA, KL to the old policy": lambda folder: ppo(
        folder, {"peft_config": lora()}, old_kl_coef=0.1, old_kl_target=1e-4, missing_eos_penalty=0.5
    ),
    "ppo, mini-batches, early stop": lambda folder: ppo(
        folder, num_mini_batches=2, total_episodes=12, target_kl=1e-3, normalize_rewards=True, reward_clip=1.0, lam=0.9
    ),
    "ppo, tokens of an environment": lambda folder: ppo(
        folder, {"rollout_func": with_environment}, gamma=0.9, whiten_rewards=True, advantage_estimator="2_step"
    ),
    "ppo, bf16 autocast": lambda folder: ppo(folder, critic="head", bf16=True, kl_estimator="k3"),
    "dpo, sigmoid, smoothed, bf16 autocast": lambda folder: dpo(folder, label_smoothing=0.1, bf16=True),
    "dpo, ipo, precomputed reference": lambda folder: dpo(
        folder, loss_type="ipo", precompute_ref_log_probs=True, max_length=12
    ),
    "dpo, hinge, adapter": lambda folder: dpo(folder, {"peft_config": lora()}, loss_type="hinge"),
    "dpo, mixed losses": lambda folder: dpo(folder, loss_type=["sigmoid", "sft"], loss_weights=[0.8, 0.2]),
    "reward": reward,
}


DEMOS = ["demo ppo", "demo dpo"]


def words(completions: list[str], **kwargs: Any) -> list[float]:
    """A tenth of the number of words of each completion."""
    return [len(completion.split()) / 10 for completion in completions]


def record(name: str) -> dict[str, Any]:
    """Every log line of a run without what the machine decides, and a digest of all weights at its end."""
    with tempfile.TemporaryDirectory() as folder:
        run = RUNS[name](folder)
        if isinstance(run, Path):  # of a command: what it left
            from safetensors.torch import load_file

            weights = load_file(run / "model.safetensors")
            history = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        else:
            run.train()
            run.evaluate()
            weights, history = dict(run.model.named_parameters()), run.state.log_history
        digest = hashlib.sha256()
        for parameter in sorted(weights):
            digest.update(parameter.encode())
            digest.update(weights[parameter].detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"lines": [without_machine(line) for line in history], "weights": digest.hexdigest()}


def without_machine(line: dict[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in sorted(line.items()) if not OF_THE_MACHINE.search(key)}


def demo(command: str) -> dict[str, Any]:
    """The first four steps of a demo recipe. PPO's reward model is the embedded actor with a head of fixed weights."""
    from trl_ext.cli.main import main

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--logging_steps", "1", "--report_to", "none", "--eval_on_start", "False", "--test_size", "8"]
        flags += ["--eval_strategy", "no", "--save_strategy", "no", "--train_size", "64"]
        four_steps = ["--total_episodes", "256"] if command == "ppo" else ["--max_steps", "4"]
        if command == "ppo":
            main(["reward", "--output_dir", f"{folder}/judge", "--max_steps", "4", *flags, *in_padded_rows()])
            flags += ["--reward_model_path", f"{folder}/judge"]
        main([command, "--output_dir", f"{folder}/out", *flags, *four_steps])
        state = json.loads(Path(folder, "out", "trainer_state.json").read_text(encoding="utf-8"))
    return {"lines": [without_machine(line) for line in state["log_history"]]}


def recorded(checkout: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The records of one side, by run, from a process of its own whose package is that of `checkout`."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout), *HELPERS]),
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, __file__, "--record", file.name, "--runs", *names]
        print(f"== {len(names)} runs in {checkout}", flush=True)
        done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SystemExit(f"The runs failed in {checkout}:\n{done.stdout.decode()[-6000:]}")
        return json.loads(Path(file.name).read_text(encoding="utf-8"))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two records, in words: empty if nothing does."""
    found = [] if old.get("weights") == new.get("weights") else ["the final weights differ"]
    if len(old["lines"]) != len(new["lines"]):
        found.append(f"{len(old['lines'])} log lines before, {len(new['lines'])} now")
    for number, (before, now) in enumerate(zip(old["lines"], new["lines"], strict=False)):
        for key in sorted(before):
            if before.get(key) != now.get(key):
                found.append(f"line {number}, {key}: {before.get(key)} before, {now.get(key)} now")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", help="the commit to compare the working tree with")
    parser.add_argument("--runs", nargs="+", default=list(RUNS), help="these runs only, by name")
    parser.add_argument("--demo", action="store_true", help="also the first four steps of both demo recipes")
    parser.add_argument("--record", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.record:
        records = {name: demo(name.split()[-1]) if name in DEMOS else record(name) for name in given.runs}
        Path(given.record).write_text(json.dumps(records), encoding="utf-8")
        return
    if not given.commit:
        parser.error("give the commit to compare with, such as main~5")
    names = given.runs + (DEMOS if given.demo else [])
    with tempfile.TemporaryDirectory() as folder, checked_out(given.commit, Path(folder) / "old") as old:
        before, now = recorded(old, names), recorded(ROOT, names)
    found = {name: differences(before[name], now[name]) for name in names}
    for name in names:
        print(f"{'DIFFERS' if found[name] else 'equal':8} {name}", *found[name][:12], sep="\n    ")
    if any(found.values()):
        raise SystemExit(f"{sum(map(bool, found.values()))} of {len(names)} differ from {given.commit}.")
    print(f"All {len(names)} runs are equal to {given.commit}, to the last digit.")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of a commit, removed at the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--detach", str(folder), commit], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True, capture_output=True)


if __name__ == "__main__":
    main()
