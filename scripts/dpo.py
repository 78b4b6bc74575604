"""`trl-ext dpo` from a checkout: trl_ext/cli/commands/dpo.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["dpo", *sys.argv[1:]])
