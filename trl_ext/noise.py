"""Silence what other packages warn of and a user can do nothing about."""

import logging
import warnings


def leave_out_noise() -> None:
    """Silence it for this process; nothing else is silenced."""
    # TRL 1.16 uses the old name of activation checkpointing.
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
    # TrainingArguments pins memory by default; without a GPU torch says that it will not, which is right.
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning)
    # On import, about a kernel for 4 bits on CPUs that it can do without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
