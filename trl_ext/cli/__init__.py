"""
The command line: `trl-ext COMMAND`, and `scripts/COMMAND.py`, which is the same. A command's body is in `commands/`.

    main              finds the command
    options           reads defaults, recipe and flags
    parser            the options of commands that train or score, by topic
    flags             the flags of the other commands; hints at what a misspelt one was to be
    errors            one sentence instead of a traceback
    wording           says it as it is typed: `beta` is `--beta`, a dataset is its file
    shipped           the help texts that come with the package
    kept_help         prints a help text, and the cache of the others
    topics            groups options for `--help`
    older_names       what options were called earlier and elsewhere
    recipes           finds the files of `configs/`
    models            the options of the model
    reward_functions  finds the functions of `--reward_funcs` and tries them
    data              the options of the data, and the rows
    training          runs the commands that train
    output            refuses to write over another run
    launch            starts several processes
    fit               checks that a run fits
    dry_run           prints what a run would be
    schema            the JSON schema of a command's recipes
    closing           prints what a run has left
"""
