"""`trl-ext report` from a checkout: trl_ext/cli/commands/report.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
