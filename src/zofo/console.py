"""What a command says: to whom, and on streams that outlive their reader."""

import contextlib
import io
import os
from collections.abc import Callable, Generator
from typing import Any

Say = Callable[[str], None]  # told what is done, line by line


class Lasting:
    """A stream that goes on in silence once whoever read it has seen enough, so that the work is done all the same."""

    def __init__(self, stream: Any) -> None:
        self._stream = io.StringIO() if stream is None else stream  # None: closed from the beginning
        self.encoding = self._stream.encoding  # these three are what bars ask of a stream
        self.isatty, self.fileno = self._stream.isatty, self._stream.fileno

    def write(self, text: str) -> int:
        with self._silenced():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._silenced():
            self._stream.flush()

    @contextlib.contextmanager
    def _silenced(self) -> Generator[None]:
        try:
            yield
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
