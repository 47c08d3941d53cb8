"""The commands of `dsgformer`, one a module.

A module has `SUMMARY`, a phrase for the list of commands; `add_arguments(parser)`; and `run(arguments)`,
which returns the exit status.  It imports nothing heavy but inside `run`: `dsgformer --help` reads all of
them.
"""
