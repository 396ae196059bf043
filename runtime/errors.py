"""The one error class a user can cause; the command line prints its message and exits with code 2."""


class UserError(ValueError):
    """A request, file or argument is wrong; the message says what, its value and what to do."""
