"""
Reward models.

    trainer   TRL's RewardTrainer, which looks at data and model first and counts pairs
    card      the model card
"""
