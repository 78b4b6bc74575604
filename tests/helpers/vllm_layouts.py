"""Runs that train with the stand-in for vLLM on two processes, and what reached it."""

import tempfile

from accelerate.utils import broadcast_object_list, gather_object
from peft import LoraConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import ppo_runs
import tiny
import zero_runs
from fake_vllm import vllm


DIFFERENCE = "sampling/sampling_logp_difference/max"
CASES = {
    (mode, kind): {"vllm_mode": mode, "vllm_enable_sleep_mode": mode == "colocate", "peft": kind == "lora"}
    for mode in ("colocate", "server")
    for kind in ("full", "lora")
}


def run(paths, inside, peft, **options):
    """
    Three rollouts with a critic of its own, answered by vLLM with the model `inside` it; of all processes: the largest
    difference of log-probabilities in each, how often weights were sent, whether the critic was ever gathered.
    """
    unset_hf_deepspeed_config()  # of the run before
    models = paths | {"value_model": paths["reward_model"]}
    if peft:
        models["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, vllm(model=inside) as sampler:
        trainer = ppo_runs.ppo_trainer(
            folder,
            models,
            use_vllm=True,
            use_cpu=True,
            kl_coef=0.0,
            learning_rate=1e-2,
            total_episodes=24,
            num_ppo_epochs=1,
            num_sample_generations=0,
            **options,
        )
        gathered = gathered_for_vllm(trainer)
        trainer.train()
    of_critic = {id(parameter) for parameter in trainer.critic.parameters()}
    loads = sampler.calls.count("load")
    return {
        "differences": ppo_runs.logged(trainer, DIFFERENCE),
        "loads": gather_object([loads]),
        "critic was gathered": any(gather_object([bool(gathered & of_critic)])),
        "partitioned": any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()),
        "gathered": len(gathered),
    }


def gathered_for_vllm(trainer):
    """A set that fills with the ids of the parameters that are gathered for vLLM."""
    backend = trainer.vllm_generation._dist
    gather, seen = backend.gather_params, set()

    def note(parameters):
        seen.update(map(id, parameters))
        return gather(parameters)

    backend.gather_params = note
    return seen


def measure(folder, engine):
    """Of the models of `tiny.save_tiny`, under "ddp" or "zero3"."""
    paths = {"model": str(folder / "actor"), "reward_model": str(folder / "reward_model")}
    options, cases = {}, [("colocate", "full"), ("server", "lora")]
    if engine == "zero3":
        options["deepspeed"], cases = zero_runs.only_stage(3), list(CASES)
    inside = {case: tiny.tiny_actor() for case in cases}
    return {"/".join(case): run(paths, inside[case], **CASES[case], **options) for case in cases}


def ahead(prompts):
    """
    What two processes ask a server for and log, with functions and a model as rewards: without learning with lags of 0
    and 1, from a dataset and a stream of several shards; and learning with a lag of 1, whole and resumed.
    """
    sources = {"dataset": prompts, "stream": prompts.to_iterable_dataset(num_shards=2)}
    measured = {}
    for name, source in sources.items():
        for lag in (0, 1):
            measured[name, lag] = asked_and_logged(source, 0, rollout_lag=lag, learning_rate=0.0)
    with tempfile.TemporaryDirectory() as folder:
        folder = broadcast_object_list([folder])[0]
        options = {"rollout_lag": 1, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        measured["whole"] = asked_and_logged(prompts, 0, folder, **options)
        measured["resumed"] = asked_and_logged(prompts, 2, folder, **options)
    return measured


def asked_and_logged(prompts, begun, folder=None, **options):
    """The prompts of each request, of a main process, and the log; of a run that goes on once there were `begun`."""
    with tempfile.TemporaryDirectory() as own, vllm(begun=begun) as sampler:
        trainer = ppo_runs.ppo_trainer(
            folder or own,
            {"reward_funcs": ppo_runs.response_lengths, "reward_model": tiny.tiny_reward_model()}
            | {"train_dataset": prompts},
            use_vllm=True,
            vllm_mode="server",
            use_cpu=True,
            per_device_train_batch_size=1,
            total_episodes=12,
            num_sample_generations=0,
            **options,
        )
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if begun else None)
        trainer.accelerator.wait_for_everyone()
    measured_by_clocks = ("time", "_per_second", "memory/", "rollout_lag")
    log = [
        {key: value for key, value in line.items() if not any(part in key for part in measured_by_clocks)}
        for line in trainer.state.log_history[:-1]
    ]
    return {"asked": sampler.asked, "log": log, "lags": ppo_runs.logged(trainer, "sampling/rollout_lag")}
