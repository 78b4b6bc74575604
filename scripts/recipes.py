"""`trl-ext recipes` from a checkout: trl_ext/cli/commands/recipes.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["recipes", *sys.argv[1:]])
