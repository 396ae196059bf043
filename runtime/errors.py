"""What a caller may have to handle."""


class UserError(ValueError):
    """A request, file or argument is wrong; the message says what, its value and what to do.

    The command line prints it as one sentence and exits with code 2.
    """


class Cancelled(Exception):
    """The caller's `cancel` answered true between two steps."""
