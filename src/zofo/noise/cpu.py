"""The noise in C (`cpu.c`), compiled once per machine. Where that fails, `c_kernel` is None and `eager` is used."""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import CDLL, Structure, c_float, c_int, c_int64, c_uint32, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from zofo.cache import cache_folder
from zofo.noise.eager import NUMBERS, Distribution, Piece

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Term(Structure):
    _fields_ = (("k0", c_uint32), ("k1", c_uint32), ("factor", c_float))


class CKernel:
    """The noise as the library `path` writes it: tensors in main memory, contiguous, float32, bfloat16 or float16."""

    def __init__(self, path: Path) -> None:
        library = CDLL(str(path))
        terms = c_void_p, c_int, c_int  # the terms, how many, and their distribution
        self._sum, self._rows = library.write_sum, library.write_rows
        self._sum.restype = self._rows.restype = None
        self._sum.argtypes = (
            c_void_p, c_void_p, c_int, c_int, c_int64, c_uint32, *terms, c_float, c_float, c_void_p, c_int,
        )  # fmt: skip
        self._rows.argtypes = (c_void_p, c_void_p, c_int, c_int64, c_void_p, c_int64, *terms, c_float, c_int)

    def __call__(self, piece: Piece) -> None:
        read, write, start, terms, distribution, keep, limit, rounding = piece
        self._sum(
            read.data_ptr(), write.data_ptr(), _TYPES[read.dtype], _TYPES[write.dtype], read.numel(), start,
            (_Term * len(terms))(*terms), len(terms), NUMBERS[distribution], keep, limit,
            None if rounding is None else (_Term * 1)(rounding), torch.get_num_threads(),
        )  # fmt: skip

    def rows(self, piece: Piece, rows: Tensor) -> None:
        """Row i of `write` (R, D) <- row `rows[i]` (int64) of a matrix `read` (V, D) of one block, plus its terms."""
        read, write, _, terms, distribution, _, limit, _ = piece
        self._rows(
            read.data_ptr(), write.data_ptr(), _TYPES[read.dtype], read.shape[1], rows.data_ptr(), len(rows),
            (_Term * len(terms))(*terms), len(terms), NUMBERS[distribution], limit, torch.get_num_threads(),
        )  # fmt: skip


@lru_cache
def c_kernel(distribution: Distribution = "normal") -> CKernel | None:
    """The kernel for tensors in main memory, or None where it does not work or does not know the distribution."""
    try:
        return CKernel(_library()) if distribution in NUMBERS else None
    except OSError as error:  # no compiler, a cache that cannot be written, a library that cannot be loaded
        logger.info("the noise could not be compiled: %s", error)
        return None


def _library() -> Path:
    """The compiled library, made if it is not there, or OSError."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("there is no C compiler (cc, gcc or clang)")
    digest = hashlib.sha256(_SOURCE.read_bytes() + repr((compiler, _FLAGS, _processor())).encode()).hexdigest()[:16]
    library = cache_folder() / f"noise-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            partial = Path(folder) / library.name
            _compile(compiler, partial)
            partial.replace(library)  # atomically: another process may be doing the same
    return library


def _compile(compiler: str, target: Path) -> None:
    command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(target)]
    result = subprocess.run([*command, "-fopenmp"], capture_output=True, text=True, check=False)
    if result.returncode:  # Apple's compiler comes without OpenMP
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(f"{compiler} failed: {result.stderr.strip()[:500]}")


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by machines of several kinds."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
