"""
PPO with a critic, in the order of the data.

    trainer         the steps, no mathematics
    config          the options; what GRPO's loop reads of them
    options         the options by topic, with their ranges
    config_checks   what several options must keep together
    roles/          the four models: checked, loaded, joined, asked
    run_state       everything that a run changes beside weights, optimizer and random numbers
    data            prompts, and the checks that run before a model is loaded
    rollout         the tensors of one batch of experience, with their shapes
    rewards         from one score per sequence to one reward per token
    returns         from scores to advantages and returns, and what the log says about both
    advantages      rewards-to-go, TD errors, generalised advantages
    kl              KL estimators, and the exact KL over the vocabulary
    controllers     how a KL coefficient follows the measured KL
    losses          ratio, clipped objective, value loss, entropy: per token
    terms           the terms of the loss as one table; their means and their total
    micro_batches   a rollout cut into micro-batches, each with its share of the loss terms
    coefficients    the weights of the terms now
    metrics         the log of an optimizer step and of an evaluation
    evaluation      what held-out prompts score
    guards          what stops a run
    checkpoint      what a checkpoint holds beside weights, optimizer and random numbers
    display         what people see while it runs
    card            the model card
"""
