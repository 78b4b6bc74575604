"""torchtune 0.6.1's PPO recipe for `bench_ppo_worker.py`, on random models and listed prompts, in its environment."""

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torchtune
from bench_ppo_setup import END, listed_answers
from torch import nn
from torchtune.models.qwen2 import qwen2
from torchtune.rlhf.loss import PPOLoss


PAD = 0


def recipe_module() -> ModuleType:
    """Import the recipe from its file: the folder refuses to be a package."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "ppo_full_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("ppo_recipe", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_decoder(config: dict[str, Any], longest: int, scores: bool = False) -> nn.Module:
    """Return a random actor, or a model with one number per token."""
    torch.manual_seed(0)
    model = qwen2(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=longest,
        tie_word_embeddings=scores or config.get("tie_word_embeddings", False),  # a tied head has no weights
    )
    if scores:
        model.output = nn.Linear(config["hidden_size"], 1, bias=False)
    return model


def build(job: dict[str, Any], clock: Any, prompts: list[list[int]]) -> Any:
    """
    Return the recipe as its `setup` leaves it, without checkpoints and files; `train` is its own. It samples up to the
    limit and cuts later, so listed answers take the place of its own.
    """
    module = recipe_module()
    generate, updates, batch = module.generation.generate, iter(range(job["updates"])), job["batch"]

    def generate_listed(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sequences, logits = generate(*args, **kwargs)
        if job["answers"]:
            sequences[:, -job["response"] :] = listed_answers(job, next(updates))
        return sequences, logits

    module.generation.generate = clock.generating(generate_listed)
    recipe = object.__new__(module.PPOFullFinetuneRecipeSingleDevice)
    longest = max(map(len, prompts)) + job["response"]
    recipe._policy_model = random_decoder(job["config"], longest)
    recipe._ref_policy_model = random_decoder(job["config"], longest).eval().requires_grad_(False)
    recipe._value_model = random_decoder(job["config"], longest, scores=True)
    recipe._reward_model = random_decoder(job["config"], longest, scores=True).eval().requires_grad_(False)
    trained = [*recipe._policy_model.parameters(), *recipe._value_model.parameters()]
    recipe._optimizer = torch.optim.AdamW(trained, lr=3e-6)
    recipe._loss_fn = PPOLoss(epsilon=0.2, value_coeff=0.1, value_clip_range=0.2)
    recipe._tokenizer = SimpleNamespace(pad_id=PAD)
    recipe._stop_token_ids = torch.tensor([END] if job["answers"] else [])
    of_updates = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    recipe._dataloader = [{"tokens": padded(of_update)} for of_update in of_updates]
    recipe._sampler = SimpleNamespace(set_epoch=lambda epoch: None)
    recipe._profiler = module.DummyProfiler()
    sizes = {"batch_size": batch, "_forward_batch_size": batch, "_ppo_batch_size": batch}
    sizes |= {"_ppo_backward_batch_size": batch, "_gradient_accumulation_steps": 1, "_ppo_epochs": job["epochs"]}
    sizes |= {"_max_generated_tokens": job["response"], "_total_steps": job["updates"], "_total_epochs": 1}
    mathematics = {"_kl_coeff": 0.05, "_gamma": 1.0, "_lmbda": 0.95, "_whiten_rewards": False, "_temperature": 1.0}
    mathematics |= {"_top_k": None, "_min_response_length": None, "_penalise_no_eos": False, "_reward_penalty": -3}
    state = {"_steps_run": 0, "_epochs_run": 0, "global_step": 0, "_rng": torch.Generator().manual_seed(0)}
    machine = {"_device": torch.device("cpu"), "_dtype": torch.float32, "compile": False, "enable_kv_cache": True}
    machine |= {"_optimizer_in_bwd": False, "profiler_profile_memory": False, "_log_every_n_steps": 10**9}
    for name, value in (sizes | mathematics | state | machine).items():
        setattr(recipe, name, value)

    def caching(enable_kv_cache: bool, decoder_max_seq_len: int) -> contextlib.AbstractContextManager[None]:
        cache = {"batch_size": batch, "dtype": torch.float32, "device": torch.device("cpu")}
        return module.local_kv_cache(recipe._policy_model, decoder_max_seq_len=decoder_max_seq_len, **cache)

    def close_update(*args: Any) -> None:
        clock.on_step_end(None, SimpleNamespace(global_step=recipe._steps_run), None)

    recipe.cache_ctx_manager = caching
    recipe.ppo_step = clock.learning(recipe.ppo_step)
    recipe.cleanup_after_step = close_update
    recipe.save_checkpoint = lambda *args, **kwargs: None
    clock.on_train_begin(None, None, None)
    return recipe


def padded(prompts: list[list[int]]) -> torch.Tensor:
    """Return prompts in one tensor, padded on the left; a token that would be padding is another one."""
    width = max(map(len, prompts))
    return torch.tensor([[PAD] * (width - len(ids)) + [max(i, END + 1) for i in ids] for ids in prompts])
