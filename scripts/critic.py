"""`trl-ext critic` from a checkout: trl_ext/cli/commands/critic.py."""

import sys

from trl_ext.cli.main import main


if __name__ == "__main__":
    main(["critic", *sys.argv[1:]])
