"""
Runs: their requirements, log, folder and card.

    requirements   numbers, packages and folders, checked before a model is loaded
    checkpoints    complete or absent: written beside, synced, listed, renamed; checked before a run is resumed
    failures       what ends a run from outside, in words
    signals        SIGTERM and Ctrl-C during a training
    saving         how every trainer saves and stops, with its options
    steps_left     refuse a checkpoint that has no step left
    best_metric    by which metric the best checkpoint is chosen
    profiler       seconds and memory of the phases of a run
    trackio_run    one run in trackio for training and evaluations
    final_line     the last steps of a run are logged too
    log            what a Trainer has logged, as series
    convergence    whether a run has converged
    alarms         what in a log deserves a look
    tables         tables on the terminal and as JSON lines
    credit         answers by token, each with its credit
    folder         files in a run's folder
    facts          what a trainer knows of its run, in words
    card           the model card
"""
