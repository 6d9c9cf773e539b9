"""The one exception that means: what the user gave cannot work; and how the errors of others are told in a line."""

import difflib
from collections.abc import Iterable

# of torch's allocators on Linux, on Windows and on accelerators, of cuBLAS, and of the operating system
_NO_MEMORY = ("allocate memory", "not enough memory", "out of memory", "alloc_failed")


class ZofoError(ValueError):
    """Raised for bad input: before any work starts, wherever that can be known.

    The message is one line: what was given, why it cannot work, how to mend it. The command line prints
    it without a traceback and exits with status 2; in Python it is an ordinary `ValueError`.
    """


class NonFiniteLossError(ZofoError):
    """A loss or gradient that is not finite; nothing has changed because of it."""


# what a forward of a model raises for inputs, weights or adapters that do not fit it
FORWARD_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an allocator failed, which says nothing of what was given: torch raises a plain RuntimeError on a CPU.

    Examples:
        >>> is_lack_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
        True
    """
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none.

    Examples:
        >>> first_line(TimeoutError())
        'TimeoutError'
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def in_one_line(error: BaseException, most: int | None = None) -> str:
    r"""An error's whole message in one line, of at most so many characters.

    Examples:
        >>> in_one_line(ValueError("no such\n  thing"))
        'no such thing'
    """
    return " ".join(str(error).split())[:most]


def did_you_mean(word: str, known: Iterable[str], otherwise: str, most: int = 1) -> str:
    """A question that names the known words nearest to one that is unknown; `otherwise` where none is near.

    Examples:
        >>> did_you_mean("penlty", ["penalty", "seed"], "see the list")
        'did you mean penalty?'
    """
    near = difflib.get_close_matches(word, list(known), n=most, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def listed(words: Iterable[str], most: int = 30) -> str:
    """Words in quotation marks, the first of them where there are many.

    Examples:
        >>> listed(["text", "label"]), listed("abc", most=2)
        ("'text', 'label'", "'a', 'b', ...")
    """
    every = list(words)
    return ", ".join(map(repr, every[:most])) + ", ..." * (len(every) > most)
