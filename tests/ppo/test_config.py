"""`PPOConfigX`: TRL 1.12's names, what the Trainer's loop derives from them, and what is refused."""

import copy
import dataclasses
import json
import math
import pickle
import re
from typing import get_type_hints

import pytest
from transformers import HfArgumentParser
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
from trl import GRPOConfig

from trl_ext import PPOConfigX
from trl_ext.ppo.config import PPOLoopConfig


# The fields of TRL 1.12's PPOConfig, in its order (trl/experimental/ppo/ppo_config.py).
TRL112_OPTIONS = (
    "learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size "
    "num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path "
    "push_to_hub reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef "
    "kl_estimator cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation"
).split()
TRL112_COMPUTED = (
    "world_size num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size"
).split()

# Fields of GRPO 1.16's config that mean in PPO what they mean in GRPO.
SHARED_WITH_GRPO = set(
    "learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32 "
    "remove_unused_columns ds3_gather_for_generation shuffle_dataset pad_to_multiple_of temperature top_p top_k min_p "
    "generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode "
    "vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host "
    "vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
    "vllm_tensor_parallel_size reward_weights mask_truncated_completions max_tool_calling_iterations "
    "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
    "vllm_importance_sampling_clip_min log_completions log_multimodal num_completions_to_print log_unique_prompts "
    "log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config "
    "use_transformers_paged vllm_importance_sampling_cap num_generations num_generations_eval".split()
)

# Option, its name in GRPO, a value other than the default.
NAMES_IN_GRPO = [
    ("response_length", "max_completion_length", 7),
    ("kl_coef", "beta", 0.3),
    ("cliprange", "epsilon", 0.1),
    ("cliprange_high", "epsilon_high", 0.3),
    ("dual_clip", "delta", 3.0),
    ("num_ppo_epochs", "num_iterations", 3),
    ("ent_coef", "entropy_coef", 0.5),
]

# Options of GRPO that PPO refuses, with a value that is not the default.
REFUSED = {
    "loss_type": "grpo",
    "importance_sampling_level": "sequence",
    "scale_rewards": "batch",
    "multi_objective_aggregation": "normalize_then_sum",
    "use_bias_correction_kl": False,
    "sync_ref_model": True,
    "use_adaptive_entropy": True,
    **dict.fromkeys(
        "sapo_temperature_neg sapo_temperature_pos "
        "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg ref_model_sync_steps steps_per_generation "
        "generation_batch_size".split(),
        8,
    ),
    **dict.fromkeys(
        "off_policy_mask_threshold top_entropy_quantile ref_model_mixup_alpha entropy_coef_min entropy_coef_max "
        "entropy_coef_delta entropy_target".split(),
        0.5,
    ),
}


def config(**options) -> PPOConfigX:
    return PPOConfigX(output_dir="unused", report_to="none", **options)


# --- names


def test_trl112_options_are_fields():
    assert set(TRL112_OPTIONS) <= {field.name for field in dataclasses.fields(PPOConfigX) if field.init}


@pytest.mark.parametrize("name", TRL112_COMPUTED)
def test_trl112_computed_field_is_a_read_only_property(name):
    args = config(total_episodes=16)
    assert isinstance(getattr(args, name), int)
    with pytest.raises(AttributeError):
        setattr(args, name, 3)
    with pytest.raises(TypeError, match=name):
        config(**{name: 3})


@pytest.mark.parametrize(
    "name, value",
    {
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "lam": 0.95,
        "gamma": 1.0,
        "vf_coef": 0.5,
        "ent_coef": 0.01,
        "temperature": 1.0,
        "kl_coef": 0.05,
        "kl_placement": "loss",
        "kl_controller": "fixed",
        "old_kl_coef": 0.0,
        "critic": "model",
        "critic_warmup_steps": 0,
        "advantage_estimator": "gae",
        "whiten_advantages": True,
        "normalize_rewards": False,
        "num_ppo_epochs": 4,
        "num_mini_batches": 1,
        "response_length": 53,
        "learning_rate": 3e-6,
        "target_kl": None,
        "reward_clip": None,
        "missing_eos_penalty": None,
    }.items(),
)
def test_default_is_the_documented_one(name, value):
    assert getattr(config(), name) == value


def test_lam_that_nobody_has_written_gives_way_to_the_length():
    """A copy is the same config, and another one may follow the length."""
    args = config()
    written = config(lam_alpha=0.5)
    sent = pickle.loads(pickle.dumps(written))
    for follows in (written, dataclasses.replace(args, lam_alpha=0.5), sent, copy.deepcopy(written)):
        assert follows.lam == args.lam == 0.95
        of_file = json.loads(json.dumps(follows.to_dict()))
        assert dataclasses.replace(follows) == PPOConfigX(**of_file) == follows
    with pytest.raises(ValueError, match="both set the λ"):
        dataclasses.replace(pickle.loads(pickle.dumps(config(lam=0.95))), lam_alpha=0.5)


@pytest.mark.parametrize("placement, estimator", [("loss", "k2"), ("reward", "k1")])
def test_kl_estimator_default_follows_the_placement(placement, estimator):
    args = config(kl_placement=placement)
    assert args.kl_estimator is None
    assert PPOLoopConfig(args).kl_estimator == estimator


def test_every_option_of_grpo_is_shared_renamed_or_refused():
    """A new option in TRL fails here until someone decides what it means in PPO."""
    of_grpo = set(GRPOConfig.__annotations__) - {"_VALID_DICT_FIELDS"}
    renamed = {grpo_name for _, grpo_name, _ in NAMES_IN_GRPO}
    assert of_grpo == SHARED_WITH_GRPO | renamed | set(REFUSED)


@pytest.mark.parametrize("name, grpo_name, value", NAMES_IN_GRPO)
def test_grpo_name_is_derived_for_the_loop_and_the_users_config_keeps_what_was_written(name, grpo_name, value):
    args = config(**{name: value})
    loop = PPOLoopConfig(args)
    assert getattr(args, grpo_name) is None
    # GRPO's beta is 0: the trainer holds the reference model itself.
    assert getattr(loop, grpo_name) == (0.0 if name == "kl_coef" else value)
    assert getattr(loop, name) == value


@pytest.mark.parametrize("name, grpo_name, value", NAMES_IN_GRPO)
def test_grpo_name_alone_sets_the_option(name, grpo_name, value):
    assert getattr(config(**{grpo_name: value}), name) == value


@pytest.mark.parametrize("name, grpo_name, value", NAMES_IN_GRPO)
def test_two_names_set_differently_are_an_error_and_alike_are_not(name, grpo_name, value):
    with pytest.raises(ValueError, match=f"`{name}={value}` and `{grpo_name}={2 * value}` are two names"):
        config(**{name: value, grpo_name: 2 * value})
    assert getattr(config(**{name: value, grpo_name: value}), name) == value


@pytest.mark.parametrize("name, value", REFUSED.items())
def test_option_that_means_nothing_in_ppo_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"`{name}=.*means nothing in PPO: \w+"):
        config(**{name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_option_at_its_default_is_not_set(name):
    default = next(field.default for field in dataclasses.fields(GRPOConfig) if field.name == name)
    assert config(**{name: default}).num_ppo_epochs == 4


# --- batch arithmetic


@pytest.mark.parametrize(
    "per_device, accumulation, world, mini_batches, epochs, expected",
    [
        # expected: rollout, mini-batch, micro-batch per rank, micro-batches per optimizer step and per rollout, steps
        (2, 8, 1, 1, 4, (16, 16, 2, 8, 8, 4)),
        (2, 8, 1, 4, 4, (16, 4, 2, 2, 8, 16)),
        (2, 8, 4, 4, 1, (64, 16, 2, 2, 8, 4)),
        (4, 2, 1, 4, 2, (8, 2, 2, 1, 4, 8)),  # a mini-batch smaller than a micro-batch shrinks it
        (6, 2, 1, 3, 1, (12, 4, 4, 1, 3, 3)),  # to the largest size that divides it
        (1, 1, 1, 1, 1, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_batch_arithmetic(monkeypatch, per_device, accumulation, world, mini_batches, epochs, expected):
    monkeypatch.setattr(PPOConfigX, "world_size", property(lambda self: world))
    args = config(
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=mini_batches,
        num_ppo_epochs=epochs,
    )
    loop = PPOLoopConfig(args)
    for each in (args, loop):  # the computed fields of the loop's copy are the user's
        assert (each.batch_size, each.mini_batch_size) == expected[:2]
        assert each.local_batch_size * world == each.batch_size
        assert each.local_mini_batch_size * world == each.mini_batch_size
        assert each.optimizer_steps_per_rollout == expected[5]
        assert each.micro_batch_size == expected[2] * world
    assert loop.per_device_train_batch_size == expected[2]
    assert loop.gradient_accumulation_steps == expected[3]
    assert loop.steps_per_generation == expected[4]
    assert loop.num_iterations == epochs
    assert loop.generation_batch_size == expected[0]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (per_device, accumulation)


def test_mini_batches_that_do_not_divide_the_rollout_are_an_error():
    with pytest.raises(ValueError, match=r"8 responses per rank .*`num_mini_batches=3` does not divide"):
        config(per_device_train_batch_size=2, gradient_accumulation_steps=4, num_mini_batches=3)


SIXTEEN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize(
    "n, mini_batches, sizes",
    # prompts in a rollout; sequences of a micro-batch, which holds whole groups or a part of one
    [(1, 1, (16, 4)), (2, 1, (8, 4)), (4, 2, (4, 4)), (8, 1, (2, 4)), (16, 1, (1, 4)), (3, 1, None)],
)
def test_several_responses_to_a_prompt(n, mini_batches, sizes):
    options = {"num_generations": n, "num_mini_batches": mini_batches, **SIXTEEN}
    if sizes is None:
        with pytest.raises(ValueError, match=r"num_generations=3` does not divide .* of 16 .* nearest that do: 2, 4"):
            config(**options)
        return
    args, loop = config(**options), PPOLoopConfig(config(**options))
    assert (args.num_prompts, args.batch_size) == (loop.num_prompts, loop.batch_size) == (sizes[0], 16)
    assert loop.per_device_train_batch_size == sizes[1]
    assert loop.num_generations == args.num_generations == n


def test_micro_batch_of_odd_groups_holds_whole_ones():
    args = config(per_device_train_batch_size=5, gradient_accumulation_steps=6, num_generations=3)
    assert PPOLoopConfig(args).per_device_train_batch_size == 3


def test_budget_of_tokens_takes_the_place_of_the_micro_batch():
    args = config(micro_batch_tokens=512, num_mini_batches=2, **SIXTEEN)
    loop = PPOLoopConfig(args)
    assert (loop.per_device_train_batch_size, loop.gradient_accumulation_steps) == (8, 1)
    assert (loop.steps_per_generation, loop.batch_size) == (2, 16)


def test_deepspeed_auto_sees_the_optimizer_steps_accumulation(monkeypatch):
    """DeepSpeed's `auto` is filled in while the parent's checks run."""
    seen, checks = {}, GRPOConfig.__post_init__

    def fill_in(self):
        checks(self)
        deepspeed = HfTrainerDeepSpeedConfig(
            {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
            }
        )
        deepspeed.trainer_config_process(self)
        seen.update(deepspeed.config)

    monkeypatch.setattr(GRPOConfig, "__post_init__", fill_in)
    config(per_device_train_batch_size=2, gradient_accumulation_steps=8, num_mini_batches=4, bf16=False)
    assert seen["train_micro_batch_size_per_gpu"] == 2
    assert seen["gradient_accumulation_steps"] == 2
    assert seen["train_batch_size"] == 4


@pytest.mark.parametrize("episodes, rollouts", [(16, 2), (17, 3), (1, 1)])
def test_total_episodes_sets_max_steps(episodes, rollouts):
    args = config(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        total_episodes=episodes,
        num_ppo_epochs=3,
        num_mini_batches=2,
    )
    assert args.num_total_batches == rollouts
    assert PPOLoopConfig(args).max_steps == 6 * rollouts
    assert args.max_steps == -1


def test_num_total_batches_follows_max_steps_or_is_unknown():
    assert config(max_steps=9, num_ppo_epochs=4).num_total_batches == 3
    assert config().num_total_batches is None


def test_total_episodes_and_max_steps_together_are_an_error():
    with pytest.raises(ValueError, match=r"`total_episodes=8` .* `max_steps=3`"):
        config(total_episodes=8, max_steps=3)


# --- a rebuilt config is the same config

WRITTEN = [
    {},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_mini_batches": 4, "total_episodes": 48},
    {"kl_controller": "band", "kl_band": [0.1, 0.3], "kl_coef": 0.2, "stop_token": "eos"},
    {"kl_placement": "reward", "kl_estimator": "k1", "cliprange_value": None, "target_kl": 0.1},
    {"beta": 0.1, "max_completion_length": 9, "num_iterations": 2},
    {"stop_token_id": 2, "critic": "head", "advantage_estimator": "2_step", "num_generations": 1},
]


@pytest.mark.parametrize("written", WRITTEN)
def test_config_made_again_is_the_same(written):
    """By `replace`, and from its dictionary, the loop's too."""
    args = config(**written)
    assert dataclasses.replace(args) == args
    assert dataclasses.replace(args, seed=7).seed == 7
    assert PPOConfigX(**json.loads(json.dumps(args.to_dict()))) == args
    assert PPOConfigX(**PPOLoopConfig(args).to_dict()) == args


def test_config_of_the_loop_writes_down_the_users_values():
    args = config(per_device_train_batch_size=2, gradient_accumulation_steps=8, num_mini_batches=4, total_episodes=16)
    written = PPOLoopConfig(args).to_dict()
    assert written["gradient_accumulation_steps"] == 8
    assert written["steps_per_generation"] is None
    assert written["max_steps"] == -1


def test_dictionary_hides_the_hub_token_and_shows_the_stop_token():
    written = config(hub_token="secret", stop_token="eos").to_dict()
    assert written["hub_token"] == "<HUB_TOKEN>"
    assert written["stop_token"] == "eos"


def test_command_line_sets_every_kind_of_option():
    flags = (
        "--output_dir x --report_to none --kl_controller band --kl_band 0.1 0.4 --cliprange_value 0.3 --stop_token eos"
    )
    (args,) = HfArgumentParser(PPOConfigX).parse_args_into_dataclasses(flags.split())
    assert (args.kl_band, args.cliprange_value, args.stop_token) == ([0.1, 0.4], 0.3, "eos")


# --- ranges


OUT_OF_RANGE = {
    0: "num_ppo_epochs num_mini_batches response_length local_rollout_forward_batch_size total_episodes cliprange "
    "reward_clip target_kl",
    -1: "num_sample_generations critic_warmup_steps missing_eos_penalty lam kl_coef vf_coef ent_coef old_kl_coef",
}


@pytest.mark.parametrize(
    "value, name", [(value, name) for value, names in OUT_OF_RANGE.items() for name in names.split()]
)
def test_value_out_of_its_options_range_is_refused(value, name):
    with pytest.raises(ValueError, match=f"`{name}` is {value}; it must be"):
        config(**{name: value})


RANGED = [
    name for name, hint in get_type_hints(PPOConfigX, include_extras=True).items() if hasattr(hint, "__metadata__")
]


@pytest.mark.parametrize("name", RANGED)
def test_value_of_another_type_is_refused_by_name(name):
    for value in ("nonsense", 3.5 if name == "freeze_critic" else [], object):
        with pytest.raises(ValueError, match=f"`{name}` is {re.escape(repr(value))}; it must be"):
            config(**{name: value})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "`temperature` is 0.0; it must be above 0"),
        ({"disable_dropout": False}, "`disable_dropout` is False; it must be True"),
        ({"cliprange_value": 0.0}, "`cliprange_value` is 0.0; it must be above 0, or unset"),
        ({"num_ppo_epochs": 1.5}, "`num_ppo_epochs` is 1.5; it must be an integer of at least 1"),
        ({"vf_coef": math.inf}, "`vf_coef` is inf; it must be 0 or above, and finite"),
        ({"critic_learning_rate": -1.0}, "`critic_learning_rate` is -1.0; it must be above 0, or unset"),
        ({"kl_controller": "proportional", "kl_target": -1.0}, "`kl_target` is -1.0; it must be above 0"),
        ({"generation_kwargs": {"temperature": 0.5}}, r"`generation_kwargs` holds \['temperature'\], which"),
        ({"metric_for_best_model": "loss"}, "PPO has no held-out loss. Use 'eval_reward/score'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "follows a metric. Set `metric_for_best_model`"),
        ({"gamma": 1.1}, "`gamma` is 1.1; it must be from 0 to 1"),
        ({"critic": "tail"}, "`critic` is 'tail'"),
        ({"critic_lam": 1.5}, "`critic_lam` is 1.5; it must be from 0 to 1, or unset"),
        ({"critic_warmup_until": 0.0}, "`critic_warmup_until` is 0.0; it must be above 0 and at most 1, or unset"),
        ({"critic_warmup_until": 1.1}, "`critic_warmup_until` is 1.1; it must be above 0 and at most 1, or unset"),
        ({"critic_warmup_until": 0.5, "vf_coef": 0.0}, "waits for a critic that does not learn with `vf_coef=0`"),
        ({"lam_alpha": 0.0}, "`lam_alpha` is 0.0; it must be above 0 and finite, or unset"),
        ({"lam_alpha": math.inf}, "`lam_alpha` is inf; it must be above 0 and finite, or unset"),
        ({"lam_alpha": 0.05, "lam": 0.9}, "`lam=0.9` and `lam_alpha=0.05` both set the λ"),
        ({"lam_alpha": 0.05, "lam": 0.95}, "`lam=0.95` and `lam_alpha=0.05` both set the λ"),
        (
            {"critic_lam": 1.0, "advantage_estimator": "2_step"},
            "`critic_lam=1.0` is read by `advantage_estimator='gae'`",
        ),
        ({"lam_alpha": 1.0, "advantage_estimator": "reinforce"}, "is read by `advantage_estimator='gae'` only"),
        ({"critic_gate": True, "advantage_estimator": "reinforce"}, "`critic_gate` switches the critic's part"),
        ({"positive_nll_coef": 0.1}, "`positive_nll_coef=0.1` with `positive_min_score=None`.* set both, or neither"),
        ({"positive_min_score": 1.0}, "`positive_nll_coef=0.0` with `positive_min_score=1.0`"),
        ({"dual_clip": 1.2}, "`dual_clip` is 1.2; it must be above 1.2"),
        ({"delta": 1.4, "cliprange_high": 0.5}, "`dual_clip` is 1.4; it must be above 1.5"),
        ({"stop_token": "period"}, "`stop_token` is 'period'"),
        ({"stop_token": "eos", "stop_token_id": 2}, "Both `stop_token` and `stop_token_id`"),
        ({"advantage_estimator": "magic"}, "advantage estimator is 'magic'"),
        ({"advantage_estimator": ["gae"]}, r"advantage estimator is \['gae'\]"),
        ({"kl_placement": "both"}, "`kl_placement` is 'both'"),
        ({"kl_controller": "pid"}, "`kl_controller` is 'pid'"),
        ({"kl_estimator": "k4"}, "`kl_estimator` is 'k4'; it must be one of .*k2.* in the loss"),
        ({"kl_estimator": "k1"}, r"`kl_estimator='k1'`.*`kl_placement='reward'`"),
        ({"kl_placement": "reward", "kl_estimator": "full"}, "`kl_estimator` is 'full'.* in the reward"),
        ({"kl_target": 1.0}, "`kl_target` is read by `kl_controller='proportional'` only"),
        ({"kl_horizon": 10}, "`kl_horizon` is read by `kl_controller='proportional'` only"),
        ({"kl_controller": "proportional"}, "needs `kl_target`"),
        ({"kl_band": [0.1, 0.2]}, "`kl_band` is read by `kl_controller='band'` only"),
        ({"kl_controller": "band", "kl_band": [0.2, 0.1]}, "`kl_band` is .*0 < low < high"),
        ({"kl_controller": "band", "kl_band": [0.2]}, "`kl_band` is .*two numbers"),
        ({"kl_controller": "band", "kl_coef": 0.0}, "scales `kl_coef`, which is 0"),
        ({"old_kl_target": 0.1}, "`old_kl_target` steers `old_kl_coef`, which is 0"),
    ],
)
def test_value_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimator": "k2"},
        {"kl_estimator": "k3"},
        {"kl_estimator": "full"},
        {"kl_placement": "reward", "kl_estimator": "k1"},
        {"kl_placement": "reward", "kl_estimator": "k2"},
        {"kl_placement": "reward", "kl_estimator": "k3"},
        {"kl_controller": "proportional", "kl_target": 1.0, "kl_horizon": 100},
        {"kl_controller": "band", "kl_band": [0.1, 0.2]},
        {"old_kl_coef": 0.1, "old_kl_target": 0.01},
        {"cliprange_value": None},
        {"kl_coef": 0.0},
    ],
)
def test_lawful_neighbour_is_accepted(options):
    args = config(**options)
    assert {name: getattr(args, name) for name in options} == options
