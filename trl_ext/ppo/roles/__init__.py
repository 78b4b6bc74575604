"""
The four models of PPO: actor, critic, reference, reward.

    inputs             what the constructor was given, checked before weights are loaded
    load               the models, loaded
    join               critic and reward adapter put into the actor, the frozen models beside it
    critic             the critic: built, attached, split off when the actor is saved
    state_values       state values from a classifier
    adapters           several roles on one base
    adapter_checks     adapters that cannot do what they are given for
    reward_models      reward models, asked by token ids or by text
    reward_forms       the token ids in which a reward model reads an answer
    reward_functions   reward functions, checked as they are given and as they answer
    offload            frozen models in host memory while nothing reads them
    padding            rows padded on the left, read as without padding
    forward            one call of the actor: log-probabilities, entropy, values, exact KL
"""
