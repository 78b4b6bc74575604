"""
Three steps of PPO and of DPO under each of several layouts, in two processes, and what they measure.

A layout is {"environment": what its launcher sets, "options": of the trainers' configs, "adapter": LoRA or not,
"only": "ppo" or "dpo" or null, "start": a folder in place of the actor's, "ppo" and "dpo": more options of one of
them}. The models are read from, and the trained ones saved to, the folder.
"""

from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import GradientState
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import dpo_runs
import ppo_runs
import tiny
import zero_runs


HELD_OUT = {"ppo": lambda: tiny.tiny_prompts(4, seed=1), "dpo": lambda: dpo_runs.tiny_pairs(4, seed=1)}
OPTIONS = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
WITHOUT_KL = ("ddp.yaml", "zero2.json", "zero3.yaml")  # the layouts that are also built without a reference
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def run(algorithm: str, folder: Path, name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Trains, saves to `folder / name / algorithm`, and measures."""
    start, output = zero_runs.KeepStart(), folder / name / algorithm
    held = zero_runs.KeepHeld(start)
    models: dict[str, Any] = {"callbacks": [start]}
    options = OPTIONS | layout["options"] | layout.get(algorithm, {})
    if "eval_strategy" in options:
        models["eval_dataset"] = HELD_OUT[algorithm]()
    if layout.get("adapter"):
        models["peft_config"] = LoraConfig(**LORA)
    if "start" in layout:
        models["model"] = str(folder / layout["start"])
    if layout.get("quantized"):  # NF4 on a CPU needs such widths
        models |= {"model": str(folder / "wide"), "quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    with zero_runs.launched(layout["environment"]):
        trainer = zero_runs.BUILD[algorithm](folder, output, models, **options)
        measured = {"reference": trainer.ref_model is not None}
        if trainer.is_fsdp_enabled:
            watch_memory(trainer, held)
        passes = ppo_runs.returned_by(trainer, "_compute_loss")
        if options.keys() >= {"critic_steps", "deepspeed"}:
            measured["moved by the critic's steps"] = watch_critic_steps(trainer)
        trainer.train()
        engine = trainer.model_wrapped
        measured["held"] = held.moments
        measured["passes"] = len(passes)
        measured |= {"wrapper": type(engine).__name__, "steps": trainer.state.global_step}
        measured["loss"] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        measured["norms"] = [
            {name.removeprefix("grad_norm/"): float(line[name]) for name in line if name.startswith("grad_norm")}
            for line in trainer.state.log_history
            if "loss" in line
        ]
        measured["elements"] = {"trained": zero_runs.local_and_whole(trainer.model)}
        if trainer.ref_model is not None:
            measured["elements"]["reference"] = zero_runs.local_and_whole(trainer.ref_model)
            measured["reference wrapper"] = type(trainer.ref_model).__name__
        if algorithm == "ppo":
            reward = trainer.reward_funcs[0].model
            measured["log-probabilities"] = str(trainer.run_state.rollout.old_logps.dtype)
            measured["reward wrapper"] = type(reward).__name__
            measured["elements"]["reward"] = zero_runs.local_and_whole(reward)
            measured["elements"]["critic"] = zero_runs.local_and_whole(trainer.critic)
        if measured["wrapper"] == "DeepSpeedEngine":
            measured["stage"] = engine.zero_optimization_stage()
            measured["applied"] = engine.global_steps
            measured["optimizer"] = type(engine.optimizer.optimizer).__name__
            measured["offloads"] = [str(engine.zero_offload_optimizer()), str(engine.zero_offload_param())]
            measured["optimizer elements"] = zero_runs.optimizer_elements(engine)
        trainer.save_model()
        measured["weights"] = zero_runs.full_weights(trainer.model)
        moved = {key: not torch.equal(start.weights[key], value) for key, value in measured["weights"].items()}
        trains = {key: parameter.requires_grad for key, parameter in trainer.model.named_parameters()}
        measured["still"] = [key for key in moved if trains[key] and not moved[key]]
        measured["moved though frozen"] = [key for key in moved if moved[key] and not trains[key]]
        if "start" in layout:
            measured["start"] = start.weights
            places = {"given": folder / layout["start"], "left": output} if trainer.is_world_process_zero() else {}
            measured |= {name: load_file(place / "adapter_model.safetensors") for name, place in places.items()}
            measured["kl"] = [line["kl/ref"] for line in trainer.state.log_history if "kl/ref" in line]
        measured["best"] = Path(trainer.state.best_model_checkpoint or "").name
        if algorithm == "ppo" and name in WITHOUT_KL:
            measured["without kl"] = without_reference(folder, output, layout)
    return measured


def watch_memory(trainer: Any, held: zero_runs.KeepHeld) -> None:
    """Has `held` look on while the trainer learns, and while a rollout is sampled."""
    trainer.add_callback(held)
    rewards = [source.model for source in getattr(trainer, "reward_funcs", [])]
    held.frozen = rewards + ([] if trainer.ref_model is None else [trainer.ref_model])
    if not hasattr(trainer, "_generate_single_turn"):
        return
    generate = trainer._generate_single_turn

    def watched(*args: Any, **kwargs: Any) -> Any:
        held.moments["generate"] = held.held(trainer.model, trainer.optimizer)
        return generate(*args, **kwargs)

    trainer._generate_single_turn = watched


def step_in_every_pass() -> Any:
    """The mistake: every pass of an optimizer step is a boundary of DeepSpeed's accumulation."""
    return mock.patch.object(GradientState, "_set_sync_gradients")


def watch_critic_steps(trainer: Any) -> list[dict[str, list[str]]]:
    """A list that gets, for each step, the weights and the roles of the states that the critic's own steps moved."""
    step, moved = trainer._step_critic, []

    def now() -> tuple[dict[str, torch.Tensor], dict[str, list[torch.Tensor]]]:
        states: dict[str, list[torch.Tensor]] = {"actor": [], "critic": []}
        for role, tensor in zero_runs.optimizer_tensors(trainer.model_wrapped):
            states[role].append(tensor.detach().clone())
        # This process's shards: ZeRO-3 may be fetching what it expects to need, and cannot gather meanwhile.
        named = trainer.model.named_parameters()
        return {key: getattr(weight, "ds_tensor", weight).detach().clone() for key, weight in named}, states

    def watch(model: Any) -> None:
        if trainer._step % trainer.args.gradient_accumulation_steps:
            return step(model)
        (weights, states), _, (later, later_states) = now(), step(model), now()
        changed = [key for key in weights if not torch.equal(weights[key], later[key])]
        roles = [
            role
            for role, before in states.items()
            if len(before) != len(later_states[role]) or not all(map(torch.equal, before, later_states[role]))
        ]
        moved.append({"weights": changed, "states": roles})

    trainer._step_critic = watch
    return moved


def without_reference(folder: Path, output: Path, layout: dict[str, Any]) -> list[str]:
    """Which models a PPO run loads with `kl_coef=0`, in order."""
    from transformers import PreTrainedModel

    loaded, load = [], PreTrainedModel.from_pretrained.__func__

    def note(cls, path, *args, **kwargs):
        loaded.append(Path(path).name)
        return load(cls, path, *args, **kwargs)

    with zero_runs.launched(layout["environment"]):
        PreTrainedModel.from_pretrained = classmethod(note)
        try:
            models = {"ref_model": str(folder / "reference"), "value_model": str(folder / "critic")}
            trainer = zero_runs.ppo(folder, output, models, **(OPTIONS | layout["options"] | {"kl_coef": 0.0}))
        finally:
            PreTrainedModel.from_pretrained = classmethod(load)
    assert trainer.ref_model is None
    return loaded


def measure(folder: Path, layouts: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{name}, {algorithm}": run(algorithm, folder, name, layout)
        for name, layout in layouts.items()
        for algorithm in ("ppo", "dpo")
        if layout.get("only", algorithm) == algorithm
    }
