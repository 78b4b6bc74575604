"""`trl-ext demo` from a checkout: trl_ext/cli/commands/demo.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
