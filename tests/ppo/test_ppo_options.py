"""Every option of PPO has an effect: it changes what is trained, or has a test of its own."""

import inspect
from typing import ClassVar, get_origin

import pytest
import torch
from datasets import Dataset

import tiny
from ppo_runs import changed, ppo_run, ppo_trainer, snapshot
from trl_ext import PPOConfigX


def two_ends():
    model = tiny.tiny_actor()
    model.generation_config.eos_token_id = [2, 9]
    return {"model": model}


def far_reference():
    return {"ref_model": tiny.tiny_actor(5)}


SAMPLED = {"per_device_train_batch_size": 8, "response_length": 30, "temperature": 2.0}
# Option: what both runs share, its value in the second run, and the models of both.
CASES = {
    "learning_rate": ({}, 5e-3, None),
    "num_ppo_epochs": ({}, 3, None),
    "num_mini_batches": ({}, 2, None),
    "total_episodes": ({}, 12, None),
    "response_length": ({}, 5, None),
    "stop_token": (SAMPLED, "eos", two_ends),
    "stop_token_id": (SAMPLED, 11, None),
    "missing_eos_penalty": (SAMPLED, 2.0, None),
    "normalize_rewards": ({}, True, None),
    "reward_clip": ({}, 0.1, None),
    "whiten_rewards": ({"whiten_advantages": False}, True, None),
    "kl_coef": ({}, 0.5, None),
    "kl_placement": ({}, "reward", None),
    "kl_estimator": ({}, "full", None),
    "kl_controller": ({}, "band", None),
    "kl_target": ({"kl_controller": "proportional", "kl_target": 50.0, "kl_horizon": 10}, 1e-4, far_reference),
    "kl_horizon": ({"kl_controller": "proportional", "kl_target": 1e-4}, 5, far_reference),
    "kl_band": ({"kl_controller": "band", "kl_band": [1e-6, 100.0]}, [1e-6, 1e-5], far_reference),
    "temperature": ({}, 0.5, None),
    "policy_objective": ({"cliprange": 0.01}, "mask", None),
    "cliprange": ({}, 0.01, None),
    "cliprange_high": ({"cliprange": 0.01}, 0.5, None),
    "dual_clip": ({"cliprange": 0.01, "num_ppo_epochs": 3}, 1.02, None),
    "vf_coef": ({}, 0.1, None),
    "cliprange_value": ({}, 1e-4, None),
    "ent_coef": ({}, 0.5, None),
    "old_kl_coef": ({}, 1.0, None),
    "old_kl_target": ({"old_kl_coef": 1.0}, 1e-6, None),
    "positive_nll_coef": ({"positive_nll_coef": 0.1, "positive_min_score": 0.0}, 1.0, None),
    "positive_min_score": ({"positive_nll_coef": 1.0, "positive_min_score": -9.0}, 0.5, None),
    "target_kl": ({"num_ppo_epochs": 3}, 1e-6, None),
    "gamma": ({}, 0.5, None),
    "lam": ({}, 0.1, None),
    "lam_alpha": ({}, 0.3, None),
    "critic_lam": ({}, 0.1, None),
    "critic_gate": ({}, True, None),
    "advantage_estimator": ({}, "2_step", None),
    "whiten_advantages": ({}, False, None),
    "critic": ({}, "head", None),
    "critic_learning_rate": ({}, 1e-4, None),
    "critic_weight_decay": ({}, 0.5, None),
    "critic_lr_scheduler_type": ({}, "constant", None),
    "critic_max_grad_norm": ({}, 1e-3, None),
    "critic_steps": ({}, 3, None),
    "critic_stop_gradient": ({"critic": "head"}, True, None),
    "freeze_critic": ({}, ["*self_attn*"], None),
    "critic_warmup_steps": ({}, 1, None),
    "critic_warmup_until": ({}, 1.0, None),
}
# Options that change no number of a run: the test that shows what they do.
SEEN_ELSEWHERE = {
    "local_rollout_forward_batch_size": "test_sequences_per_scoring_pass_are_an_option",
    "num_sample_generations": "test_number_of_sample_tables_is_an_option",
    "num_generations": "test_responses_to_a_prompt_stay_together",
    "num_generations_eval": "test_several_responses_to_a_held_out_prompt",
    "micro_batch_tokens": "test_budgets_give_the_same",
    "score_batch_tokens": "test_budgets_give_the_same",
    "packing": "test_packed_rows_give_what_padded_ones_give",
    "dataset_num_proc": "test_prompts_are_checked_in_several_processes",
    "sft_model_path": "test_models_may_be_named_in_the_config",
    "reward_model_path": "test_models_may_be_named_in_the_config",
    "disable_dropout": "test_value_out_of_range_is_refused",  # in test_config.py
    "model_adapter_name": "test_named_adapters_are_trained_and_referred_to",
    "ref_adapter_name": "test_named_adapters_are_trained_and_referred_to",
    # In tests/runs
    "checkpoint_digest": "test_digests_are_of_small_files_or_of_all",
    "save_on_signal": "test_signal_ends_the_step_and_saves",
    # In test_ahead.py
    "rollout_lag": "test_rollouts_are_sampled_with_the_weights_of_so_many_rollouts_ago",
    # In roles/test_reward_calls.py
    "reward_timeout": "test_run_goes_on_as_with_a_server_that_answers_at_once",
    "reward_max_retries": "test_run_goes_on_as_with_a_server_that_answers_at_once",
    "reward_max_concurrency": "test_no_more_are_asked_at_once_than_the_option_says",
    # In roles/test_offload.py and test_quantized_frozen.py
    "offload_frozen_models": "test_a_frozen_model_is_on_the_device_while_it_scores_and_at_no_other_time",
    "reward_model_quantization": "test_scores_are_those_of_the_checkpoint_in_fewer_bits",
    "ref_model_quantization": "test_kl_is_to_the_reference_in_fewer_bits",
}
GRPO_NAMES = {
    *("max_completion_length", "beta", "epsilon", "epsilon_high", "delta", "num_iterations", "entropy_coef"),
}


def test_every_option_of_ppo_is_in_one_of_the_lists():
    topics = [part for part in PPOConfigX.__mro__ if part.__module__.startswith("trl_ext.")]
    annotations = [item for topic in topics for item in inspect.get_annotations(topic).items()]
    declared = {option for option, kind in annotations if get_origin(kind) is not ClassVar}
    assert declared == CASES.keys() | SEEN_ELSEWHERE.keys() | GRPO_NAMES


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the final parameters of a run; equal runs are made once."""
    runs = {}

    def train(options, models):
        key = (repr(sorted(options.items())), models)
        if key not in runs:
            trainer = ppo_run(tmp_path_factory.mktemp("option"), models() if models else None, **options)
            runs[key] = snapshot(trainer.model)
        return runs[key]

    return train


@pytest.mark.parametrize("option", CASES)
def test_option_changes_the_trained_models(trained, option):
    shared, value, models = CASES[option]
    shared = {"learning_rate": 1e-2} | shared
    without, with_it = trained(shared, models), trained(shared | {option: value}, models)
    assert any(not torch.equal(tensor, with_it.get(name, torch.zeros(()))) for name, tensor in without.items())


def test_control_the_same_options_give_the_same_models(tmp_path, trained):
    again = ppo_run(tmp_path, learning_rate=1e-2).model
    assert changed(again, trained({"learning_rate": 1e-2}, None)) == set()


def test_sequences_per_scoring_pass_are_an_option(tmp_path):
    sizes = {}
    for size in (64, 3):
        trainer = ppo_trainer(tmp_path, local_rollout_forward_batch_size=size, max_steps=1)
        seen = sizes.setdefault(size, [])
        for model in (trainer.ref_model, trainer.reward_funcs[0].model):
            model.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
            )
        trainer.train()
    assert sizes == {64: [4, 4], 3: [3, 1, 3, 1]}


@pytest.mark.parametrize("number, tables", [(0, 0), (1, 1), (2, 2), (10, 4)])
def test_number_of_sample_tables_is_an_option(tmp_path, capsys, number, tables):
    models = {"eval_dataset": tiny.tiny_prompts(2, seed=3)}
    ppo_run(tmp_path, models, total_episodes=16, num_sample_generations=number, num_ppo_epochs=1)
    assert capsys.readouterr().out.count("Samples at step") == tables


def test_prompts_are_checked_in_several_processes(tmp_path, monkeypatch):
    seen = []
    original = Dataset.map

    def note(self, function, *args, num_proc=None, **kwargs):
        seen.append(num_proc)
        return original(self, function, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", note)
    ppo_trainer(tmp_path, dataset_num_proc=2)
    assert seen == [2]
