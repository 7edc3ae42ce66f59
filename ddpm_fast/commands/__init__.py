"""The commands of `ddpm-fast`, a module each: `add_arguments(subparsers)` and `run(arguments)` -> exit code.

`cli.py` imports the one that is asked for. Errors of a command are one line on stderr; see `errors.py`.
"""
