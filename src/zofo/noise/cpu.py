"""The noise in C (`noise.c`): compiled once per machine, optional.

Where there is no C compiler, or what it makes does not work, `c_kernel` returns None and the torch form in
`noise.py` is used, which writes the same bits more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zofo.cache import cache_folder

logger = logging.getLogger(__name__)

Hashed = tuple[int, int, float]
"""(k0, k1, factor): what one term is made of, in one block of its stream."""
Kernel = Callable[[Tensor, Tensor, int, Sequence[Hashed], bool, float, float, Hashed | None], None]
"""Writes a `Piece`, whose fields are its arguments."""


class Piece(NamedTuple):
    """write <- keep * read + the terms: contiguous tensors, in one block of 2**32 numbers of the stream."""

    read: Tensor
    write: Tensor
    start: int  # modulo 2**32
    terms: Sequence[Hashed]
    rademacher: bool
    keep: float
    limit: float  # what is larger in magnitude keeps its value
    rounding: Hashed | None  # rounds 16 bits stochastically


_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Term(ctypes.Structure):
    _fields_ = (("k0", ctypes.c_uint32), ("k1", ctypes.c_uint32), ("factor", ctypes.c_float))


class CKernel:
    """The noise as the library `path` writes it: tensors in main memory, contiguous, float32, bfloat16 or float16."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        pointer, integer, whole = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._sum, self._rows = library.write_sum, library.write_rows
        self._sum.restype = self._rows.restype = None
        self._sum.argtypes = (
            pointer, pointer, integer, integer, whole, ctypes.c_uint32, pointer, integer, integer, ctypes.c_float,
            ctypes.c_float, pointer, integer,
        )  # fmt: skip
        self._rows.argtypes = (
            pointer, pointer, integer, whole, pointer, whole, pointer, integer, integer, ctypes.c_float, integer,
        )  # fmt: skip

    def __call__(
        self,
        read: Tensor,
        write: Tensor,
        start: int,
        terms: Sequence[Hashed],
        rademacher: bool,
        keep: float,
        limit: float,
        rounding: Hashed | None,
    ) -> None:
        """As `Kernel`."""
        self._sum(
            read.data_ptr(),
            write.data_ptr(),
            _CODES[read.dtype],
            _CODES[write.dtype],
            read.numel(),
            start,
            (_Term * len(terms))(*terms),
            len(terms),
            rademacher,
            keep,
            limit,
            None if rounding is None else (_Term * 1)(rounding),
            torch.get_num_threads(),
        )

    def rows(
        self, read: Tensor, write: Tensor, numbers: Tensor, terms: Sequence[Hashed], rademacher: bool, limit: float
    ) -> None:
        """Row i of `write` <- row `numbers[i]` of `read` and its terms; the stream's index runs through all of `read`.

        Args:
            read: (V, D), of less than 2**32 elements.
            write: (R, D), of the same dtype.
            numbers: (R,) int64, each in [0, V).
            terms: hashed for block 0.
            rademacher: signs, or else the bell.
            limit: what is larger in magnitude keeps its value.
        """
        self._rows(
            read.data_ptr(),
            write.data_ptr(),
            _CODES[read.dtype],
            read.shape[1],
            numbers.data_ptr(),
            len(numbers),
            (_Term * len(terms))(*terms),
            len(terms),
            rademacher,
            limit,
            torch.get_num_threads(),
        )


@lru_cache(maxsize=1)
def c_kernel() -> CKernel | None:
    """The kernel for tensors in main memory, or None."""
    try:
        return CKernel(_library())
    except OSError as error:  # no compiler, a cache that cannot be written, a library that cannot be loaded
        logger.info("the noise could not be compiled: %s", error)
        return None


def _library() -> Path:
    """The compiled library, made if it is not there.

    Raises:
        OSError: if it cannot be made.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    mark = hashlib.sha256(_SOURCE.read_bytes() + repr((compiler, _FLAGS, _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"noise-{mark}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            half = Path(folder) / library.name
            _compile(compiler, half)
            half.replace(library)  # at once: another process may be doing the same
    return library


def _compile(compiler: str, target: Path) -> None:
    complaints: list[str] = []
    for threads in (["-fopenmp"], []):  # Apple's compiler comes without OpenMP
        command = [*compiler.split(), *_FLAGS, *threads, str(_SOURCE), "-o", str(target)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode == 0:
            return
        complaints.append(made.stderr.strip())
    raise OSError(f"{compiler} failed: {complaints[-1][:500]}")


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
