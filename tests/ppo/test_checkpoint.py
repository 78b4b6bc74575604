"""A resumed run equals the run that was never interrupted, to the last bit."""

import dataclasses
import functools
import itertools
import math
import re
import shutil

import numpy
import pandas
import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, Value, concatenate_datasets
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback
from trl import GRPOTrainer

import tiny
from ppo_runs import changed, ppo_config, ppo_trainer, snapshot
from trl_ext import PPOTrainerX
from trl_ext.ppo import checkpoint
from trl_ext.ppo.coefficients import Coefficients
from trl_ext.ppo.evaluation import HeldOut
from trl_ext.ppo.metrics import LossLedger
from trl_ext.ppo.rewards import RunningMoments
from trl_ext.ppo.roles.critic import ValueModel
from trl_ext.ppo.run_state import CriticWarmup, EarlyStop, RunState


# Two passes over 8 prompts in rollouts of 4, each learned from in 4 steps: 16 steps. Checkpoints lie within a learning
# pass, between two of them, between rollouts and between passes over the data, and mostly within a logging window.
STEPS = (3, 4, 5, 6, 8, 13)
OPTIONS = {
    "num_train_epochs": 2,
    "num_mini_batches": 2,
    "logging_steps": 3,
    "save_strategy": "steps",
    "save_steps": 100,
    "normalize_rewards": True,
    "kl_controller": "band",
    "kl_band": (1e-4, 2e-4),
    "old_kl_coef": 0.5,
    "old_kl_target": 1e-3,
    "positive_nll_coef": 0.3,
    "positive_min_score": 0.0,
    "eval_strategy": "steps",
    "eval_steps": 6,
    "eval_on_start": True,
    "per_device_eval_batch_size": 2,
    "num_sample_generations": 0,
    "log_completions": True,
    "num_completions_to_print": 0,
    "optim": "adamw_torch",
}
# What a clock says.
OWN = ("time", "memory", "per_second")


def stream():
    return IterableDataset.from_generator(lambda: iter(tiny.tiny_prompts(8)))


def start_adapter(name):
    torch.manual_seed(1)
    adapter = LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(tiny.tiny_actor(), adapter, adapter_name=name)


def bfloat16_trunk():
    """A critic as people save memory: its trunk in 16 bits, its score head in 32."""
    model = tiny.tiny_reward_model(7).bfloat16()
    model.score.float()
    model.score.register_forward_pre_hook(lambda head, inputs: tuple(states.float() for states in inputs))
    return model


def new_adapter():
    return {"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")}


def by_token(completion_ids, **kwargs):
    return [[token % 7 / 4 for token in ids] for ids in completion_ids]


# Name -> models and options.
KINDS = {
    "critic of its own": (dict, {}),
    "value head, KL in the reward, rewards at tokens, gate": (
        lambda: {"reward_funcs": by_token},
        {"critic": "head", "kl_placement": "reward", "whiten_rewards": True, "critic_gate": True},
    ),
    "adapter, early stop, both upper clips": (
        new_adapter,
        {"target_kl": 1e-4, "learning_rate": 1e-2, "cliprange_high": 0.3, "dual_clip": 1.5},
    ),
    "two adapters": (new_adapter, {"critic": "adapter"}),
    "adapter to start from": (lambda: {"model": start_adapter("default")}, {"critic": "adapter"}),
    "adapter of another name": (lambda: {"model": start_adapter("mine")}, {}),
    "exact KL, old log-probabilities of the first pass": (
        dict,
        {"kl_estimator": "full", "num_mini_batches": 1, "num_ppo_epochs": 4},
    ),
    "mixture of experts, two λ": (lambda: {"model": tiny.tiny_mixture()}, {"lam_alpha": 0.5, "critic_lam": 1.0}),
    "critic of two dtypes": (lambda: {"value_model": bfloat16_trunk()}, {}),
    "rate, decay and warm-up of the critic": (
        dict,
        {"critic_learning_rate": 1e-4, "critic_weight_decay": 0.1, "critic_warmup_steps": 4},
    ),
    # Reached at the second rollout
    "warm-up until the critic explains enough": (
        lambda: {"value_model": tiny.tiny_reward_model(11)},
        {"critic_warmup_until": 0.1},
    ),
    "steps, schedule and clipping of the critic's own, masked objective": (
        dict,
        {
            "critic_steps": 2,
            "critic_lr_scheduler_type": "cosine",
            "critic_max_grad_norm": 0.1,
            "freeze_critic": ["*self_attn*"],
            "policy_objective": "mask",
        },
    ),
    "stream, value head with steps of its own": (
        lambda: {"train_dataset": stream()},
        {"critic": "head", "critic_stop_gradient": True, "critic_steps": 2},
    ),
}


CASES = [("critic of its own", step) for step in STEPS if step != 5]
CASES += [(kind, 6) for kind in list(KINDS)[1:]]
STOPPED = ("adapter, early stop, both upper clips", 7)  # its last step is left out
CASES += [STOPPED]


class SaveAt(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = state.global_step in self.steps


class StopAt(TrainerCallback):
    """Interrupts a run, as Ctrl-C does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def trainer_of(folder, kind="critic of its own", saves=(), **options):
    """Make a trainer that saves at these steps, from the same start each time."""
    torch.manual_seed(0)
    models, others = KINDS[kind]
    given = {"train_dataset": tiny.tiny_prompts(8), "eval_dataset": tiny.tiny_prompts(3, seed=3)}
    given |= {"callbacks": [SaveAt(saves)]} | models()
    short = {} if kind == "critic of its own" else {"max_steps": 8}
    return ppo_trainer(folder, given, **(OPTIONS | short | others | options))


def lines(trainer, after=0):
    """Return the log lines of later steps, without times; of several evaluations of one step, the last."""
    return {
        (line["step"], "eval_reward/score" in line): {
            name: value for name, value in line.items() if not any(part in name for part in OWN)
        }
        for line in trainer.state.log_history
        if line["step"] > after
    }


def require_equal(first, second):
    """Check that all numbers are equal to the last bit, the loss of the whole run too; NaN equals NaN."""
    assert first.keys() == second.keys()
    for key, line in first.items():
        assert line.keys() == second[key].keys()
        for name, value in line.items():
            other = second[key][name]
            assert value == other or (math.isnan(value) and math.isnan(other)), (key, name, value, other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of each kind: its folder with checkpoints, its log and its weights."""

    @functools.cache
    def of(kind="critic of its own"):
        folder = tmp_path_factory.mktemp("whole")
        trainer = trainer_of(folder, kind, STEPS if kind == "critic of its own" else (5, 6, 7))
        trainer.train()
        return folder, lines(trainer), snapshot(trainer.model)

    return of


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run that was stopped after a checkpoint."""
    folder = tmp_path_factory.mktemp("plain")
    trainer_of(folder, saves=STEPS, max_steps=6).train()
    return folder


# --- the run that goes on


@pytest.mark.parametrize("kind, step", CASES)
def test_resumed_run_is_the_run_that_never_stopped(whole, tmp_path, kind, step):
    folder, expected, weights = whole(kind)
    trainer = trainer_of(tmp_path, kind)
    output = trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert output.training_loss == output.metrics["train_loss"] == trainer.state.log_history[-1]["train_loss"]
    require_equal(lines(trainer, after=step), {key: line for key, line in expected.items() if key[0] > step})
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_completions_and_columns_of_a_reward_function_survive_resuming(tmp_path):
    def length(completions, log_extra, log_metric, **kwargs):
        lengths = [numpy.float32(len(text)) for text in completions]
        log_extra("length", lengths)
        log_metric("longest", max(lengths))
        return [float(value) for value in lengths]

    models = {"reward_funcs": [length], "train_dataset": tiny.tiny_prompts(8), "callbacks": [SaveAt((5,))]}
    options = OPTIONS | {"max_steps": 6, "eval_strategy": "no", "eval_on_start": False}
    ppo_trainer(tmp_path, models, **options).train()
    table = tmp_path / "completions" / "completions_00006.parquet"
    expected = pandas.read_parquet(table)
    assert len(expected["length"]) == 4
    table.unlink()
    ppo_trainer(tmp_path, models, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    pandas.testing.assert_frame_equal(pandas.read_parquet(table), expected, check_dtype=False)


def test_interrupted_run_is_resumed_by_the_same_trainer(whole, tmp_path):
    """As in a notebook; nothing that came after the checkpoint may be left."""
    folder, expected, weights = whole("rate, decay and warm-up of the critic")
    trainer = trainer_of(tmp_path, "rate, decay and warm-up of the critic")
    stop = StopAt(7)
    trainer.add_callback(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    require_equal(lines(trainer, after=5), {key: line for key, line in expected.items() if key[0] > 5})
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def test_every_field_of_a_runs_state_is_saved_and_restored(plain):
    """A checkpoint amid a rollout, loaded into the state of a run that has just begun."""
    saved = torch.load(plain / "checkpoint-3" / "ppo_state.pt", weights_only=True)["run"]
    assert saved.keys() == {field.name for field in dataclasses.fields(RunState)}
    state = trainer_of(plain.parent / "fresh").run_state
    state.load_state_dict(saved)
    again = state.state_dict(is_learning=True, passes_over_data=saved["passes_over_data"])
    assert repr(again) == repr(saved)
    assert again["rollout"]["scores"].equal(saved["rollout"]["scores"])


def test_true_takes_the_last_checkpoint(plain, tmp_path):
    """Held-out prompts are not answered again at the start."""
    shutil.copytree(plain, tmp_path / "run")
    trainer = trainer_of(tmp_path / "run", max_steps=8)
    trainer.train(resume_from_checkpoint=True)
    assert [step for step, _ in lines(trainer, after=6)] == [8, 8]
    assert [line["step"] for line in trainer.state.log_history if "eval_reward/score" in line] == [0, 6, 8]
    assert trainer.args.eval_on_start


def nothing(*args):
    """Stands in for a part of the state that is forgotten."""


def without_positive_counts(self, state, load=RunState.load_state_dict):
    load(self, state)
    for micro_batch in itertools.chain.from_iterable(self.micro_batches):
        micro_batch.num_positive = 0.0


@pytest.mark.parametrize(
    "part, name, instead, kind, step",
    [
        *(
            (part, "load_state_dict", nothing, "critic of its own", 5)
            for part in (Coefficients, RunningMoments, HeldOut, LossLedger)
        ),
        (EarlyStop, "load_state_dict", nothing, *STOPPED),
        (CriticWarmup, "load_state_dict", nothing, "warm-up until the critic explains enough", 6),
        (RunState, "load_state_dict", without_positive_counts, "critic of its own", 5),
        (ValueModel, "restore", nothing, "critic of its own", 8),
        (PPOTrainerX, "_get_train_sampler", GRPOTrainer._get_train_sampler, "critic of its own", 8),
        (PPOTrainerX, "_load_rng_state", nothing, "critic of its own", 8),
    ],
)
def test_every_part_of_the_state_is_needed(whole, tmp_path, monkeypatch, part, name, instead, kind, step):
    """Without it, the resumed run differs."""
    folder, expected, _ = whole(kind)
    monkeypatch.setattr(part, name, instead)
    trainer = trainer_of(tmp_path, kind)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    with pytest.raises(AssertionError):
        require_equal(lines(trainer, after=step), {key: line for key, line in expected.items() if key[0] > step})


def test_stream_that_has_begun_again_says_that_its_place_is_lost(tmp_path, caplog):
    options = {"max_steps": 13, "eval_strategy": "no", "eval_on_start": False}
    kind = "stream, value head with steps of its own"
    trainer_of(tmp_path, kind, saves=(13,), **options).train()
    trainer_of(tmp_path, kind, **options | {"max_steps": 14}).train(resume_from_checkpoint=True)
    assert "The prompts are a stream, which the run had begun to read again" in caplog.text


def test_best_model_of_a_mixture_has_its_experts(tmp_path):
    trainer = trainer_of(tmp_path, "mixture of experts, two λ")
    best = snapshot(trainer.model)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    for parameter in trainer.model.parameters():
        parameter.data.zero_()
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert not changed(trainer.model, best)


def test_patience_of_early_stopping_is_restored_by_the_trainers_option(tmp_path):
    """docs/ppo.md names the option; without it early stopping would start counting again."""

    def run(**options):
        models = {"train_dataset": tiny.tiny_prompts(8), "eval_dataset": tiny.tiny_prompts(3, seed=3)}
        models["callbacks"] = [SaveAt((6,)), EarlyStoppingCallback(early_stopping_patience=3)]
        best = {"metric_for_best_model": "eval_reward/score", "learning_rate": 0.0, "eval_steps": 2}
        return ppo_trainer(tmp_path, models, **OPTIONS | best | options)

    whole = run()
    whole.train()
    resumed = run(restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert whole.state.global_step == resumed.state.global_step < 16


# --- what cannot go on


def test_folder_without_checkpoints(tmp_path):
    trainer = trainer_of(tmp_path)
    with pytest.raises(ValueError, match=f"There is no checkpoint to resume from in '{tmp_path}'"):
        trainer.train(resume_from_checkpoint=True)


FILES = {
    "ppo_state.pt": "ppo_state.pt",
    "rng_state.pth": "rng_state.pth",
    "optimizer.pt": "optimizer.pt",
    "scheduler.pt": "scheduler.pt",
    "model.safetensors": "weights of the actor",
    "critic/model.safetensors": "critic/",
}


@pytest.mark.parametrize("file", FILES)
def test_checkpoint_that_was_cut_off_is_refused_before_models_are_loaded(plain, tmp_path, file):
    """As a recipe or a flag names it; one of an earlier version, without a manifest."""
    shutil.copytree(plain / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "manifest.json").unlink()
    (tmp_path / "checkpoint-6" / file).unlink()
    unloaded = {"model": str(plain / "nothing"), "reward_model": str(plain / "nothing")}
    args = ppo_config(tmp_path, use_cpu=True, **OPTIONS)
    with pytest.raises(ValueError, match=rf"checkpoint-6: it has no {FILES[file]}\. It was cut off"):
        checkpoint.find_checkpoint(str(tmp_path / "checkpoint-6"), args, tiny.tiny_prompts(8))
    with pytest.raises(ValueError, match="It was cut off"):
        ppo_trainer(tmp_path, unloaded, resume_from_checkpoint="true")


def test_checkpoint_without_its_last_file(plain, tmp_path):
    shutil.copytree(plain / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-6, because it has no trainer_state\.json\."):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"gradient_accumulation_steps": 4},
            "had batch_size=4; .* batch_size=8.* is `per_device_train_batch_size` × ",
        ),
        (
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            "had micro_batch_size=2; this one has micro_batch_size=1.* is `per_device_train_batch_size` × processes",
        ),
        ({"num_ppo_epochs": 1, "seed": 7}, "had num_ppo_epochs=2, seed=42; this one has num_ppo_epochs=1, seed=7"),
    ],
)
def test_run_with_other_rollouts(plain, tmp_path, options, message):
    trainer = trainer_of(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(plain / "checkpoint-6"))


OTHER_PROMPTS = {
    "other answers for a reward function": (
        lambda: tiny.tiny_prompts(8).add_column("answer", [1] * 8),
        "other columns beside them",
    ),
    "fewer": (lambda: tiny.tiny_prompts(6), "had prompts=8, checksum.*; this one has prompts=6, checksum"),
    "others": (lambda: tiny.tiny_prompts(8, seed=5), "had other prompts, as many"),
    "in another order": (lambda: tiny.tiny_prompts(8).select(range(7, -1, -1)), "had other prompts, as many"),
}


@pytest.mark.parametrize("step", [6, 4], ids=["amid a rollout", "between rollouts"])
@pytest.mark.parametrize("name", OTHER_PROMPTS)
def test_run_on_other_prompts(plain, tmp_path, name, step):
    prompts, message = OTHER_PROMPTS[name]
    trainer = ppo_trainer(tmp_path, {"train_dataset": prompts(), "eval_dataset": tiny.tiny_prompts(3)}, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(plain / f"checkpoint-{step}"))


def test_checksum_is_of_every_column_however_rows_are_read():
    """The checksum covers what the actor reads, without padding, and what reward functions get."""
    rows = {"input_ids": [[1, 2, 3], [4, 5, 6]], "attention_mask": [[1, 1, 1], [0, 1, 1]], "answer": ["a", "b"]}
    prompts = Dataset.from_dict(rows)
    assert checkpoint.checksum(Dataset.from_dict(dict(reversed(rows.items()))).with_format("torch")) == (
        checkpoint.checksum(prompts)
    )
    assert checkpoint.checksum(concatenate_datasets([prompts, prompts]).select(range(2, 4))) == (
        checkpoint.checksum(prompts)
    )
    others = {
        "input_ids": [[1, 2, 3], [4, 5, 7]],
        "attention_mask": [[1, 1, 1], [1, 1, 1]],
        "answer": ["a", "c"],
    }
    for name, values in others.items():
        assert checkpoint.checksum(Dataset.from_dict(rows | {name: values})) != checkpoint.checksum(prompts)
    assert checkpoint.checksum(prompts.select([1, 0])) != checkpoint.checksum(prompts)


def test_checksum_decodes_no_picture():
    broken = {"prompt": ["a"], "shown": [{"bytes": b"no picture", "path": None}]}
    prompts = Dataset.from_dict(broken, features=Features({"prompt": Value("string"), "shown": Image()}))
    assert isinstance(checkpoint.checksum(prompts), int)


# Option, its value before and in the run that would go on.
OF_THE_ROLLOUT = {
    "temperature": (1.0, 0.7),
    "response_length": (6, 9),
    "stop_token": (None, "eos"),
    "stop_token_id": (None, 9),
    "missing_eos_penalty": (None, 1.0),
    "normalize_rewards": (True, False),
    "reward_clip": (None, 1.0),
    "reward_weights": (None, [0.5]),
    "whiten_rewards": (False, True),
    "whiten_advantages": (True, False),
    "gamma": (1.0, 0.9),
    "lam": (0.95, 0.5),
    "lam_alpha": (None, 0.5),
    "critic_lam": (None, 1.0),
    "critic_gate": (False, True),
    "advantage_estimator": ("gae", "2_step"),
    "policy_objective": ("clip", "mask"),
    "positive_nll_coef": (0.3, 0.1),
    "positive_min_score": (0.0, 0.5),
    "mask_truncated_completions": (False, True),
    "cast_lm_head_to_fp32": (False, True),
    "bf16": (False, True),
    "chat_template_kwargs": (None, {"a": 1}),
}


@pytest.mark.parametrize("name", OF_THE_ROLLOUT)
def test_options_of_a_rollout_may_not_change_in_the_middle_of_it(plain, tmp_path, name):
    """Refused within a rollout; between two, the next one uses the new option."""
    before, now = OF_THE_ROLLOUT[name]
    args, prompts = ppo_config(tmp_path, use_cpu=True, **(OPTIONS | {name: now})), tiny.tiny_prompts(8)
    message = rf"had {name}={re.escape(str(before))}; this one has {name}={re.escape(str(now))}\. A rollout is being"
    with pytest.raises(ValueError, match=message):
        checkpoint.find_checkpoint(str(plain / "checkpoint-6"), args, prompts)
    assert checkpoint.find_checkpoint(str(plain / "checkpoint-4"), args, prompts)


@pytest.mark.parametrize(
    "name, before, now",
    [
        ("learning_rate", 0.001, 0.01),
        ("weight_decay", 0.0, 0.1),
        ("optim", "adamw_torch", "sgd"),
        ("adam_beta2", 0.999, 0.9),
        ("critic_learning_rate", None, 0.01),
        ("critic_weight_decay", None, 0.1),
        ("critic_lr_scheduler_type", None, "cosine"),
        ("freeze_critic", [], ["*self_attn*"]),
    ],
)
def test_options_of_the_optimizer_may_not_change(plain, tmp_path, name, before, now):
    """Its groups come from the checkpoint, also between two rollouts."""
    args, prompts = ppo_config(tmp_path, use_cpu=True, **(OPTIONS | {name: now})), tiny.tiny_prompts(8)
    message = rf"had {name}={re.escape(str(before))}; this one has {name}={re.escape(str(now))}\. The optimizer in"
    for step in (4, 6):
        with pytest.raises(ValueError, match=message):
            checkpoint.find_checkpoint(str(plain / f"checkpoint-{step}"), args, prompts)


@pytest.mark.parametrize("name, before, now", [("kl_coef", 0.05, 0.1), ("kl_estimator", "k1", "k3")])
def test_kl_in_the_reward_of_a_rollout_is_kept(tmp_path, name, before, now):
    options = OPTIONS | {"kl_placement": "reward", "kl_controller": "fixed", "kl_band": [0.5, 2.0], "max_steps": 6}
    options |= {"eval_strategy": "no", "eval_on_start": False}
    models = {"train_dataset": tiny.tiny_prompts(8), "callbacks": [SaveAt((6,))]}
    ppo_trainer(tmp_path, models, **options).train()
    args = ppo_config(tmp_path, **(options | {name: now, "max_steps": 8}))
    with pytest.raises(ValueError, match=f"had {name}={before}; this one has {name}={now}"):
        checkpoint.find_checkpoint(str(tmp_path / "checkpoint-6"), args, models["train_dataset"])


def test_options_of_learning_may_change_amid_a_rollout(plain, tmp_path):
    others = {"lr_scheduler_type": "constant", "cliprange": 0.1, "vf_coef": 0.1, "ent_coef": 0.0, "logging_steps": 1}
    trainer = trainer_of(tmp_path, max_steps=8, **others)
    trainer.train(resume_from_checkpoint=str(plain / "checkpoint-6"))
    assert trainer.state.global_step == 8
    assert set(trainer.lr_scheduler.get_last_lr()) == {trainer.args.learning_rate}  # a linear one would end at 0
