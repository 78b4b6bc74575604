"""
DPO over shared rows, in the order of the data.

    trainer           the steps
    config            the options beyond TRL's
    data              pairs, their checks, and what is dropped
    reference         the reference, and the proof that training starts where it stands
    forward           TRL's call with TRL's result, computed over packed rows
    losses            implicit reward, Bradley-Terry, the loss
    metrics           pairs of a logging window or an evaluation, over all ranks
    implicit_reward   a trained policy as a reward function
    credit            the tokens of pairs with their implicit rewards
    guards            what must hold of models and losses
    card              the model card
"""
