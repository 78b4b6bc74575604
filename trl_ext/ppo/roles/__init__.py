"""
The four models of PPO: actor, critic, reference, reward.

    inputs             the constructor's arguments, checked before weights are loaded
    load               loading the models
    join               joining critic and reward adapter to the actor, and placing the frozen models
    critic             the critic: built, attached, split off when the actor is saved
    state_values       state values from a classifier
    adapters           several roles on one base
    adapter_checks     checks of adapters before weights are loaded
    reward_models      reward models, which score token ids or text
    reward_forms       the token ids in which a reward model reads an answer
    reward_functions   checks of reward functions and of their answers
    reward_calls       how long, how often and how many at once they are asked
    turn_rewards       environments that pay for the turns of the model
    offload            frozen models in host memory while nothing reads them
    padding            left-padded rows, read as without padding
    rows               the rows of a batch: packed, or padded
    forward            one call of the actor: log-probabilities, entropy, values, exact KL
"""
