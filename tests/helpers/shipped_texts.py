"""
The texts of `trl_ext/cli/shipped`, which

    python tests/helpers/shipped_texts.py

writes, when options or their help have changed.
"""

from importlib import import_module

from trl_ext.cli.commands.completion import made
from trl_ext.cli.kept_help import printed_by
from trl_ext.cli.shipped import FOLDER, stamp


# The commands whose options are read from classes that import torch.
COMMANDS = ("ppo", "critic", "dpo", "reward", "score")


def help_text(command: str) -> str:
    """What the command prints where no text is shipped."""
    return printed_by(import_module(f"trl_ext.cli.commands.{command}").main, "--help")


def texts() -> dict[str, str]:
    return {name: help_text(name) for name in COMMANDS} | {"completion": made()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in texts().items():
        (FOLDER / f"{name}.txt").write_text(text, encoding="utf-8")
    (FOLDER / "stamp").write_text(stamp() + "\n", encoding="utf-8")
