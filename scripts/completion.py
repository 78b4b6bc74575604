"""`trl-ext completion` from a checkout: trl_ext/cli/commands/completion.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["completion", *sys.argv[1:]])
