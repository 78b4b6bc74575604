"""Short runs of a tiny reward model."""

from trl import RewardConfig

import tiny
from trl_ext import RewardTrainerX


def reward_trainer(folder, rows, held_out, model=None, tokenizer=None, given=None, **options):
    settings = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "max_steps": 3, "logging_steps": 3}
    settings |= {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": None}
    return RewardTrainerX(
        tiny.tiny_reward_model() if model is None else model,
        RewardConfig(str(folder), **(settings | {"learning_rate": 0.0} | options)),
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tiny.tiny_tokenizer() if tokenizer is None else tokenizer,
        **(given or {}),
    )
