"""Group the options in `--help` by topic, the ten that matter first."""

from ..ppo.config_checks import MEANINGLESS_IN_PPO


# The ten options that most runs touch.
FIRST = {
    "reward": "config model dataset_name output_dir num_train_epochs learning_rate max_length "
    "per_device_train_batch_size use_peft dry_run",
    "ppo": "config model dataset_name reward_model_path output_dir total_episodes response_length learning_rate "
    "kl_coef dry_run",
    "critic": "config model dataset_name reward_model_path output_dir total_episodes response_length learning_rate "
    "max_passes dry_run",
    "dpo": "config model dataset_name output_dir num_train_epochs learning_rate beta per_device_train_batch_size "
    "use_peft dry_run",
    "score": "config model ref_model dataset_name output_file beta test_size batch_size load_in_4bit use_cpu",
}

# Options of TRL's and transformers' classes that `--help` shows, by topic; `--help_all` shows every option. Those of
# this package are grouped by the class that has them, under its `TOPIC`.
TOPICS = {
    "Loss and reference": "beta loss_type loss_weights label_smoothing max_length truncation_mode "
    "precompute_ref_log_probs sync_ref_model center_rewards_coefficient",
    "Rewards": "reward_weights",
    "Generation": "generation_kwargs chat_template_kwargs use_vllm vllm_mode "
    "vllm_server_base_url vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_enable_sleep_mode",
    "Model": "model_name_or_path dtype attn_implementation model_revision trust_remote_code",
    "Adapters and quantisation": "use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_modules_to_save "
    "load_in_4bit load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant",
    "Batches and memory": "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "gradient_checkpointing num_train_epochs max_steps",
    "Optimizer": "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim",
    "Evaluation, saving and logging": "output_dir eval_strategy eval_steps eval_on_start save_strategy save_steps "
    "save_total_limit checkpoint_digest save_on_signal load_best_model_at_end metric_for_best_model "
    "resume_from_checkpoint logging_steps "
    "log_completions report_to push_to_hub hub_model_id",
    "Hardware and random numbers": "bf16 use_cpu deepspeed seed",
}
_TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names.split()}
# What a command calls by another name, or has no use for: only `--help_all` shows it.
_OTHERWISE_IN_PPO = "disable_dropout beta max_completion_length epsilon num_iterations entropy_coef"
OTHERWISE = {
    "ppo": _OTHERWISE_IN_PPO,
    # A recipe of PPO may have them: they say how the actor learns.
    "critic": f"{_OTHERWISE_IN_PPO} epsilon_high delta num_ppo_epochs kl_coef kl_placement kl_estimator "
    "kl_controller kl_target kl_horizon kl_band cliprange cliprange_high dual_clip cliprange_value vf_coef ent_coef "
    "old_kl_coef old_kl_target positive_nll_coef positive_min_score target_kl lam lam_alpha critic_lam critic_gate "
    "advantage_estimator whiten_advantages whiten_rewards critic_warmup_steps critic_warmup_until policy_objective "
    "critic_steps num_sample_generations ref_adapter_name ref_model_quantization max_steps num_train_epochs "
    "eval_strategy eval_steps eval_on_start save_strategy save_steps save_total_limit checkpoint_digest "
    "save_on_signal load_best_model_at_end metric_for_best_model resume_from_checkpoint log_completions",
}
# Options that a command does not have, although it shares the class that defines them.
ABSENT = {
    "ppo": " ".join(MEANINGLESS_IN_PPO),
    "critic": " ".join(["gpu force profile samples", *MEANINGLESS_IN_PPO]),
    "score": "use_peft use_rslora use_dora lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters "
    "lora_modules_to_save lora_task_type train_size test_split_size",
}
# Help texts of options that mean something else here than where they are defined; "" is every command.
TEXTS = {
    "": {
        "output_dir": "Folder of the run. Unset: trainer_output.",
        "bf16": "Compute in bfloat16. Unset: on a GPU that has it, unless `fp16` is set.",
        "resume_from_checkpoint": "Folder checkpoint-N of the run to continue, or True for the last one in "
        "`--output_dir`. To train longer, raise the number of epochs, steps or episodes.",
    },
    "dpo": {
        "label_smoothing": "Assumed share of labels that are wrongly flipped, in [0, 0.5): conservative DPO with "
        "`--loss_type sigmoid`; also read by robust, exo_pair, aot and aot_unpaired."
    },
    "ppo": {
        "generation_kwargs": "Options of transformers' GenerationConfig, or vLLM's SamplingParams, that do not change "
        'what is sampled, such as `{"use_cache": false}`.',
        "reward_weights": "A weight for each reward, the reward model's first, then those of `--reward_funcs` in "
        "their order. Unset: 1 for each.",
        "gradient_accumulation_steps": "Times `per_device_train_batch_size`, this is the number of "
        "responses of a rollout on each process. `num_mini_batches` splits them into optimizer steps.",
    },
    "critic": {
        "total_episodes": "Responses to sample. Unset: one pass over the prompts.",
        "learning_rate": "Initial learning rate of the critic, if there is no `critic_learning_rate`.",
        "critic_learning_rate": "Initial learning rate of the critic, as in a recipe of PPO. Unset: `learning_rate`.",
        "gradient_accumulation_steps": "Times `per_device_train_batch_size`, this is the number of responses that "
        "each process samples, and then learns from, at a time. `num_mini_batches` splits them into optimizer steps.",
    },
    "score": {
        "model_name_or_path": "Policy: a folder with a model or an adapter, or a hub name. Unset: outputs/dpo-demo.",
        "model_revision": "Revision of the policy and its tokenizer, not of --ref_model.",
        "dataset_name": "A json, jsonl, csv or parquet file, a folder written by `save_to_disk`, or a hub name. "
        "Unset: the demo's held-out pairs.",
        "dataset_streaming": "Read the rows while scoring.",
        "dataset_test_split": "Split to score.",
        "dataset_train_split": "Split to score if there is no `dataset_test_split`.",
        "test_size": "Maximum number of pairs to score. Unset: all.",
        "dtype": "Data type of the weights. Unset: float32; for an adapter's base on a GPU bfloat16.",
    },
}


def text_of(command: str, name: str) -> str | None:
    """Return the help of an option, if it is not that of its class."""
    return TEXTS.get(command, {}).get(name, TEXTS[""].get(name))


def topic_of(command: str, name: str, owner: type) -> tuple[str, bool]:
    """Return the heading of an option's group, and whether `--help` shows it; `owner` is the class that defines it."""
    if name in first_of(command):
        return heading_of(command), True
    if name in OTHERWISE.get(command, "").split():
        return f"More options of {owner.__name__}", False
    if name in _TOPIC_OF:
        return _TOPIC_OF[name], True
    if owner.__module__.split(".")[0] in ("trl", "transformers"):
        return f"More options of {owner.__name__}", False
    return vars(owner).get("TOPIC", owner.__name__), True


def first_of(command: str) -> list[str]:
    """Return the names of the options that come first; `--model` is short for `model_name_or_path`."""
    names = FIRST.get(command, "").split()
    return ["model_name_or_path" if name == "model" else name for name in names]


def heading_of(command: str) -> str:
    return f"The {len(first_of(command))} options that matter first"


def order(command: str, heading: str) -> int:
    """Return the place of a group: the first options, those of this package, TRL's and transformers', the rest."""
    if heading == heading_of(command):
        return 0
    if heading.startswith("More options of ") or heading == "options":  # argparse's own: --help
        return len(TOPICS) + 3
    if heading in TOPICS:
        return 2 + list(TOPICS).index(heading)
    return 1
