"""The one exception that means: what the user gave cannot work; and how the errors of others are told in a line."""


class ZofoError(ValueError):
    """Raised for bad input: before any work starts, wherever that can be known.

    The message is one line: what was given, why it cannot work, how to mend it. The command line prints
    it without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none.

    Examples:
        >>> first_line(TimeoutError())
        'TimeoutError'
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
