"""`trl-ext merge` from a checkout: trl_ext/cli/commands/merge.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["merge", *sys.argv[1:]])
