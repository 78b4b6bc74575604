"""
Reward models, trained by `trl.RewardTrainer`.

    trainer   the trainer of `trl-ext reward`, which counts pairs
    card      the model card
"""
