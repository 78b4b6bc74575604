"""Translate options of TRL up to 1.15, LLaMA-Factory, OpenRLHF and the alignment handbook."""

# Name today -> the names that it had. One that is not an option of the command at hand is passed over, so that a name
# may stand in several lines: the first that the command has is meant.
NAMES_BEFORE = {
    "model": "model_name pretrain model_path base_model actor_model_path",
    "dtype": "torch_dtype model_dtype compute_dtype",
    "attn_implementation": "flash_attn use_flash_attention_2 flash_attention",
    "use_peft": "use_lora finetuning_type",
    "lora_r": "lora_rank lora_dim peft_lora_r lora_dimension",
    "lora_alpha": "peft_lora_alpha",
    "lora_dropout": "peft_lora_dropout",
    "lora_target_modules": "lora_target lora_modules target_modules peft_lora_target_modules",
    "load_in_4bit": "quantization_bit bits quantization load_in_nf4",
    "dataset_name": "dataset dataset_dir query_dataset prompt_data train_dataset data_path",
    "datasets": "dataset_mixer dataset_mixture",
    "dataset_config": "dataset_config_name",
    "dataset_train_split": "dataset_splits train_split dataset_split prompt_split",
    "dataset_test_split": "eval_split test_split",
    "columns": "prompt_key input_key chosen_key rejected_key output_key",
    "train_size": "max_samples max_train_samples",
    "test_size": "max_eval_samples",
    "test_split_size": "val_size",
    "output_dir": "save_path ckpt_path",
    "overwrite": "overwrite_output_dir",
    "gamma": "gae_gamma discount discount_factor",
    "lam": "gae_lambda gae_lam lambd lambda",
    "kl_coef": "init_kl_coef init_kl_coeff kl_loss_coef kl_coeff",
    "kl_estimator": "kl_penalty kl_type",
    "kl_controller": "adap_kl_ctrl",
    "kl_target": "ppo_target target",
    "kl_horizon": "horizon",
    "kl_placement": "use_kl_loss",
    "cliprange": "clip_range eps_clip clip_ratio ppo_clip",
    "cliprange_value": "vf_clip value_clip clip_range_value value_clip_range cliprange_vf",
    "vf_coef": "value_loss_coef value_coef critic_loss_coef",
    "ent_coef": "entropy_coeff entropy_loss_coef entropy_coefficient",
    "num_ppo_epochs": "ppo_epochs update_epochs noptepochs",
    "num_mini_batches": "mini_batch_size ppo_mini_batch_size nminibatches",
    "total_episodes": "num_episodes episodes steps",
    "local_rollout_forward_batch_size": "forward_batch_size micro_rollout_batch_size ppo_forward_batch_size",
    "target_kl": "early_stopping",
    "critic_learning_rate": "critic_lr value_learning_rate",
    "critic": "value_head critic_type",
    "value_model": "critic_pretrain value_model_path critic_model_path",
    "reward_model_path": "reward_model reward_pretrain reward_model_name_or_path",
    "reward_clip": "score_clip reward_clip_range cliprange_reward",
    "normalize_rewards": "use_score_scaling use_score_norm normalize_reward ppo_score_norm reward_normalization",
    "whiten_rewards": "ppo_whiten_rewards",
    "whiten_advantages": "normalize_advantages advantage_whitening",
    "response_length": "max_new_tokens max_completion_length generate_max_len max_response_length",
    "eval_max_new_tokens": "max_new_tokens",
    "use_vllm": "vllm_num_engines colocate_all_models",
    "max_length": "max_prompt_length max_completion_length cutoff_len max_seq_length max_seq_len max_len "
    "prompt_max_len generate_max_len max_target_length",
    "beta": "pref_beta dpo_beta kto_beta loss_beta kl_coef",
    "loss_type": "pref_loss dpo_loss",
    "label_smoothing": "dpo_label_smoothing",
    "loss_weights": "rpo_alpha pref_ftx",
    "packing": "packing_samples prefix_sharing pack_pairs remove_padding use_remove_padding",
    "num_generations": "n_samples_per_prompt num_return_sequences n_samples",
    "micro_batch_tokens": "ppo_max_token_len_per_gpu max_tokens_per_gpu",
    "cliprange_high": "clip_ratio_high eps_clip_high",
    "dual_clip": "clip_ratio_c eps_clip_c",
    "num_train_epochs": "max_epochs epochs num_epochs",
    "per_device_train_batch_size": "train_batch_size micro_train_batch_size per_device_batch_size rollout_batch_size "
    "train_micro_batch_size_per_gpu batch_size mini_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "learning_rate": "lr actor_learning_rate actor_lr",
    "lr_scheduler_type": "lr_scheduler lr_schedule",
    "warmup_steps": "warmup_ratio lr_warmup_ratio lr_warmup_steps",
    "weight_decay": "l2",
    "max_grad_norm": "max_norm grad_clip gradient_clipping",
    "optim": "optimizer",
    "max_steps": "steps",
    "eval_strategy": "evaluation_strategy",
    "use_cpu": "no_cuda",
    "report_to": "log_with use_wandb use_tensorboard use_swanlab",
    "project": "wandb_project tracker_project_name",
    "run_name": "wandb_run_name exp_name",
    "hub_token": "use_auth_token push_to_hub_token",
    "hub_model_id": "push_to_hub_model_id",
    "train_sampling_strategy": "group_by_length",
    "accelerate_config": "zero_stage ds_config",
    "resume_from_checkpoint": "load_checkpoint ckpt",
    "use_liger_kernel": "enable_liger_kernel use_liger use_liger_loss",
    "ref_model": "ref_model_path ref_model_name_or_path",
    "output_file": "output_path",
}
TODAY: dict[str, list[str]] = {}
for _name, _before in NAMES_BEFORE.items():
    for _word in _before.split():
        TODAY.setdefault(_word, []).append(_name)

# What a name of today wants in place of the old value -> the old names.
_VALUES = {
    "a value below 1 is a share of the steps": "warmup_ratio lr_warmup_ratio",
    "with it a LoRA adapter is trained, without it the whole model": "finetuning_type",
    "for 8 bits `load_in_8bit`": "quantization_bit bits",
    "with `loss_type` sigmoid sft and `loss_weights` 1.0 ALPHA": "rpo_alpha pref_ftx",
    "it holds for prompt and answer together": "max_prompt_length prompt_max_len",
    "proportional is the adaptive one": "adap_kl_ctrl",
    "the KL at which learning from a rollout ends": "early_stopping",
    "zero1, zero2 or zero3": "zero_stage",
    "write `columns` prompt=NAME": "prompt_key input_key",
    "write `columns` chosen=NAME": "chosen_key",
    "write `columns` rejected=NAME": "rejected_key",
    "flash_attention_2": "use_flash_attention_2",
    "group_by_length is its value": "group_by_length",
    "wandb is its value": "use_wandb",
    "tensorboard is its value": "use_tensorboard",
}
OTHER_VALUES = {name: value for value, names in _VALUES.items() for name in names.split()}

# What a name of today means where an older one may have meant something else.
MEANINGS = {"num_mini_batches": "the number of mini-batches in a rollout"}

# What to do without an option, or where the command at hand has none -> the names of such options.
_CURES = {
    "leave it out: prompts are never cut, and one that is too long for the model is named": "max_prompt_length "
    "prompt_max_len cutoff_len max_seq_length max_length truncation_mode",
    "leave it out: the reference is the model that training starts from": "ref_model ref_model_path "
    "ref_model_name_or_path",
    "set the environment variable TENSORBOARD_LOGGING_DIR, or a line of it under env: in a recipe": "logging_dir "
    "logging_path tensorboard_dir",
    "conversations are written with the chat template of the model's tokenizer": "template chat_template "
    "input_template",
    "it has no meaning any more; leave it out": "label_pad_token_id padding_value is_encoder_decoder "
    "use_logits_to_keep force_use_ref_model",
    "it has no meaning here; leave it out": "optimize_cuda_cache optimize_device_cache preprocessing_num_workers",
    "start several processes with `nproc`, one for each GPU": "actor_num_nodes actor_num_gpus_per_node num_gpus "
    "num_nodes",
    "the command says it: `trl-ext dpo`, `trl-ext ppo` or `trl-ext reward`": "stage",
    "the tokenizer is that of the model": "tokenizer_name tokenizer_name_or_path",
    "DPO has a reference; TRL's CPO trainer has none": "reference_free",
    "a batch whose loss is not finite ends the run; `target_kl` stops learning from a rollout": "ratio_threshold",
    "it is an option of `trl-ext ppo`": "target_kl",
}
WITHOUT_OPTION = {name: cure for cure, names in _CURES.items() for name in names.split()}


def what_it_is_today(name: str, known: set[str]) -> str | None:
    """Return what to give for an older option `name`, to a command with the options `known`; `None` if unknown."""
    today = next((each for each in TODAY.get(name, ()) if each in known), None)
    if today is not None:
        more = OTHER_VALUES.get(name, MEANINGS.get(today))
        return f"today it is `{today}`" + (f" ({more})" if more else "")
    return WITHOUT_OPTION.get(name)
