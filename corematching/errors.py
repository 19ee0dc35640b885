"""The one exception type that means "the user can fix this"."""

from corematching.texts import neutral


class UserError(ValueError):
    """Bad input, told in one line that names the bad value and the valid ones.

    The command line prints the message without a traceback and exits with status 2. Whatever the bad value holds, the
    message is one line that a terminal can print.
    """

    def __init__(self, message: str):
        super().__init__(neutral(str(message)))
