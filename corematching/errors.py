"""The one exception type that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input, told in one line that names the bad value and the valid ones.

    The command line prints the message without a traceback and exits with status 2.
    """
