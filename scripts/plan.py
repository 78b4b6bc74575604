"""`trl-ext plan` from a checkout: trl_ext/cli/commands/plan.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
