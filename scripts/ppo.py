"""`trl-ext ppo` from a checkout: trl_ext/cli/commands/ppo.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["ppo", *sys.argv[1:]])
