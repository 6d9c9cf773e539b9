"""The one exception that means: what the user gave cannot work."""


class ZofoError(ValueError):
    """Raised for bad input: before any work starts, wherever that can be known.

    The message is one line: what was given, why it cannot work, how to mend it. The command line prints
    it without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.
    """
