"""`ProfileCallback` gives every second of one update to one part, and leaves the run as it is."""

import gzip
import json
import time

import pytest
import torch
from transformers import TrainerCallback

import dpo_runs
import ppo_runs
import tiny
from cli_runs import run_of
from trl_ext.callbacks import ProfileCallback
from trl_ext.cli.main import main


pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
LEARN = {"learn: forward", "learn: backward", "learn: optimizer step", "everything else"}
SCORE = {"generate", "score", "score: reward", "score: critic", "score: reference"}


class Clock(TrainerCallback):
    """When every optimizer step begins and ends, by another clock; the second update's are slow."""

    def __init__(self, steps):
        self.steps, self.begins, self.ends = steps, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begins.append(time.monotonic())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        time.sleep(0.1 * (state.global_step // self.steps == 1))

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.monotonic())


def slow_when_asked_again():
    """A reward function that takes its time for the second rollout."""
    asked = []

    def reward(completions, **_):
        asked.append(completions)
        time.sleep(0.3 * (len(asked) == 2))
        return [float(len(text)) for text in completions]

    return reward


def trainer_of(kind, folder):
    if kind == "dpo":
        return dpo_runs.dpo_trainer(folder, max_steps=3)
    models = {"reward_model": None, "reward_funcs": slow_when_asked_again()}
    return ppo_runs.ppo_trainer(folder, models, total_episodes=12, num_sample_generations=0)


@pytest.mark.parametrize("kind, steps", [("ppo", 2), ("dpo", 1)])
def test_parts_add_up_to_the_second_update_and_change_nothing(tmp_path, kind, steps, capsys):
    trainer = trainer_of(kind, tmp_path / "profiled")
    callback, before, after = ProfileCallback(trainer), Clock(steps), Clock(steps)
    trainer.callback_handler.callbacks[:0] = [before, callback, after]
    trainer.train()
    # 1. Every second is in one part
    assert callback.seconds.keys() == (LEARN | SCORE if kind == "ppo" else LEARN)
    between = before.ends[2 * steps - 1] - after.begins[steps]  # without starting the profiler and writing
    assert sum(callback.seconds.values()) == pytest.approx(between, abs=0.02)
    assert callback.seconds["learn: optimizer step"] > 0.1 * steps  # of the clock behind it
    assert callback.seconds["everything else"] > 0.1 * steps  # of the clock before it
    if kind == "ppo":
        assert callback.seconds["score: reward"] > 0.3 > callback.seconds["score"]
    # 2. What is written
    folder = tmp_path / "profiled" / "profile"
    assert (folder / "table.txt").read_text() in capsys.readouterr().out
    with gzip.open(folder / "trace.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    micro_batches = {"ppo": 2}.get(kind, 1) * steps
    assert names.count("learn: forward") == names.count("learn: backward") == micro_batches
    # 3. The run is as without
    plain = trainer_of(kind, tmp_path / "plain")
    plain.train()
    assert not (tmp_path / "plain" / "profile").exists()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, plain.model.get_parameter(name)), name


def test_command_profiles_and_says_where_there_is_no_second_update(tmp_path, caplog):
    paths = tiny.save_tiny(tmp_path) | {"pairs": str(tmp_path / "pairs.jsonl")}
    dpo_runs.tiny_pairs(12).to_json(paths["pairs"])
    options = {"test_size": 2, "max_length": 64, "per_device_train_batch_size": 2, "max_steps": 2}
    main(["reward", *run_of("reward", paths, output_dir=tmp_path / "run", **options), "--profile"])
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert all(part in table for part in LEARN)
    assert not caplog.records
    short = dpo_runs.dpo_trainer(tmp_path / "short", max_steps=1)
    short.add_callback(ProfileCallback(short))
    short.train()
    assert "Nothing is profiled" in caplog.text
