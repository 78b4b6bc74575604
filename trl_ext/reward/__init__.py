"""
Reward models.

    trainer   TRL's RewardTrainer on packed pairs, which looks at data and model first
    config    the options beyond TRL's
    card      the model card
"""
