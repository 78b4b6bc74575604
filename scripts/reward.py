"""`trl-ext reward` from a checkout: trl_ext/cli/commands/reward.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["reward", *sys.argv[1:]])
