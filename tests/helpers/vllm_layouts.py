"""Runs that train with the stand-in for vLLM on two processes, and what reached it."""

import tempfile

from accelerate.utils import gather_object
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
