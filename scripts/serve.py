"""`trl-ext serve` from a checkout: trl_ext/cli/commands/serve.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
