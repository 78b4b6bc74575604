"""
Reward models.

    trainer   TRL's RewardTrainer on packed pairs, which looks at data and model first
    config    the options beyond TRL's
    forward   scores of a batch of pairs, computed over packed rows
    card      the model card
"""
