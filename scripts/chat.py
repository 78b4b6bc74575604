"""`trl-ext chat` from a checkout: trl_ext/cli/commands/chat.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["chat", *sys.argv[1:]])
