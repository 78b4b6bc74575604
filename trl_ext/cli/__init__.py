"""
The command line: `trl-ext COMMAND`, and `scripts/COMMAND.py`, which is the same.

A command's body is in `commands/`. What they share is here: `training` runs those that train, `options` reads recipe
and flags with `parser`, `topics` groups them for `--help`, `older_names` knows what they were called, `recipes` finds
the files of `configs/`, `data` and `models` have the options of both, `launch` starts several processes, `dry_run` and
`fit` say what a run would be, `closing` says what it has left.
"""
