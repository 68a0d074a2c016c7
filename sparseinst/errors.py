"""The errors a user can cause. Each is one line that says what is wrong, where, and how to mend it."""


class UserError(Exception):
    """Bad input: a setting, a path, a file. The command line prints it in one line and exits with 2."""


class DataError(UserError):
    """An annotation file or an image that cannot be used; the message names the file."""


class RunFailed(Exception):
    """A run that started well and could not end well. The command line prints it in one line and exits with 1."""
