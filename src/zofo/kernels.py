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

import torch
from torch import Tensor

from zofo.cache import cache_folder

logger = logging.getLogger(__name__)

Hashed = tuple[int, int, float]
"""(k0, k1, factor): what one term is made of, in one block of its stream."""
Kernel = Callable[[Tensor, Tensor, int, Sequence[Hashed], bool, float, Hashed | None], None]
"""(read, write, start modulo 2**32, terms, Rademacher?, keep, rounding): see `write_sum` in `noise.c`."""

_SOURCE = Path(__file__).with_name("noise.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Term(ctypes.Structure):
    _fields_ = (("k0", ctypes.c_uint32), ("k1", ctypes.c_uint32), ("factor", ctypes.c_float))


@lru_cache(maxsize=1)
def c_kernel() -> Kernel | None:
    """The kernel for tensors in main memory, or None."""
    try:
        library = ctypes.CDLL(str(_library()))
    except OSError as error:  # no compiler, a cache that cannot be written, a library that cannot be loaded
        logger.info("the noise could not be compiled: %s", error)
        return None
    pointer, integer, whole = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    function = library.write_sum
    function.restype = None
    function.argtypes = (
        pointer, pointer, integer, integer, whole, ctypes.c_uint32, pointer, integer, integer, ctypes.c_float,
        pointer, integer,
    )  # fmt: skip

    def write_sum(
        read: Tensor,
        write: Tensor,
        start: int,
        terms: Sequence[Hashed],
        rademacher: bool,
        keep: float,
        rounding: Hashed | None,
    ) -> None:
        function(
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
            None if rounding is None else (_Term * 1)(rounding),
            torch.get_num_threads(),
        )

    return write_sum


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
