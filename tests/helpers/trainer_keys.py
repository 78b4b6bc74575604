"""Keys of a log line that come from the Trainer."""

SPEED = ("runtime", "samples_per_second", "steps_per_second")

FROM_THE_TRAINER = {
    *("grad_norm", "learning_rate", "epoch", "step", "total_flos", "train_loss"),
    *(f"{when}_{what}" for when in ("train", "eval") for what in SPEED),
}
