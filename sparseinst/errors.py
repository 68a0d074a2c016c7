"""Define the errors that a user can cause. Each message is one line: the place, the problem, and a remedy."""


class UserError(Exception):
    """The input is not valid: a setting, a path or a file. The command line prints the message and exits with 2."""


class DataError(UserError):
    """An annotation file or an image cannot be used. The message names the file."""


class RunFailed(Exception):
    """A run failed after it had started. The command line prints the message and exits with 1."""
