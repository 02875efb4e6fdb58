"""The one error a user may see without a traceback."""


class UserError(Exception):
    """Input that cannot be used; the message is one line that names the thing and the remedy.

    The command line prints the message and exits with code 2.
    """
