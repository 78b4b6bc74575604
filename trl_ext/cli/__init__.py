"""
The command line: `trl-ext COMMAND`, and `scripts/COMMAND.py`, which is the same.

A command's body is in `commands/`. What they share is here: `options` reads recipe and flags with `parser`, `topics`
groups them for `--help`, `recipes` finds the files of `configs/`, `data` and `models` have the options of both,
`checkpoints` finds the one to go on from, `launch` starts several processes, `dry_run` and `fit` say what a run would
be, `closing` says what it has left.
"""
