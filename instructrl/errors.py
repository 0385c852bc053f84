"""Errors whose message is for the person at the terminal. `cli.main` prints them without a traceback."""


class UserError(Exception):
    """The command line, the recipe or the data is wrong. The message names what, where, and what to type instead."""

    exit_code = 2


class StageFailed(UserError):
    """A stage's process ended with an error. What it saved is kept, and the message says how to go on."""

    exit_code = 1
