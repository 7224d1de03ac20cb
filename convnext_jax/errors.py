"""The one exception of this package that is about what the caller gave, not about a bug here."""


class InputError(ValueError):
    """Something given by the user cannot be used: a file, a configuration, an argument.

    The message is one line that says what was wrong, where, and what to do; the command line prints
    it without a traceback and exits with status 2.
    """
