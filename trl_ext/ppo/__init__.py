"""
PPO with a critic, in the order of the data.

    trainer         the steps, no mathematics
    config          the options, and the values that GRPO's loop reads
    options         the options by topic, with their ranges
    config_checks   options that do not go together
    roles/          the four models: checked, loaded, joined, asked
    run_state       everything that a run changes beside weights, optimizer and random numbers
    data            prompts, and their checks before a model is loaded
    vllm            the precision of the run's vLLM, and whether its server fits the run
    ahead/          rollouts that a vLLM server is asked for before they are due
    rollout         the tensors of one rollout, with their shapes
    rewards         from the reward sources to one reward per token
    returns         from scores to advantages and returns, and their log
    advantages      rewards-to-go, TD errors, generalised advantages
    kl              KL estimators, and the exact KL over the vocabulary
    controllers     how a KL coefficient follows the measured KL
    terms           the terms of the loss as one table, and their coefficients
    losses          ratio, clipped objective, value loss: per token; the terms' means and their total
    micro_batches   a rollout cut into micro-batches, each with its share of the loss terms
    optimizer       the optimizer's groups, schedules, steps and norms by role
    coefficients    the current weights of the terms
    metrics         the log of an optimizer step and of an evaluation
    pretraining     the critic's pretraining on responses of a fixed policy
    saved_rollouts  these responses, kept as Parquet
    evaluation      held-out prompts, answered and scored
    guards          checks that stop a run
    saving          actor and critic, saved and loaded; the end of a step that a signal goes back to
    checkpoint      the part of a checkpoint beside weights, optimizer and random numbers
    display         the run's plan and sample completions
    credit          the tokens of responses with their credit
    card            the model card
"""
