"""`trl-ext score` from a checkout: trl_ext/cli/commands/score.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
