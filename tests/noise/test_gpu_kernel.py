"""The kernel for GPUs without a GPU, and what happens where it does not work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from zofo.noise import streams

INTERPRETED = Path(__file__).with_name("interpreted_noise.py")
TRITON = Path(sys.prefix) / "interpreter"  # where `make install` puts it


@pytest.mark.skipif(not TRITON.exists(), reason="make install found no Triton, which is for Linux on x86-64")
def test_interpreted_it_writes_the_bits_of_torch():
    # a process of its own: Triton decides when a kernel is defined, and complains about itself at the end
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(TRITON), *sys.path])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("broken", [None, object()], ids=["absent", "another"])
def test_where_it_does_not_work_torch_takes_its_place(monkeypatch, broken):
    monkeypatch.setitem(sys.modules, "zofo.noise.gpu", broken)
    streams.gpu_kernel.cache_clear()
    try:
        assert streams.gpu_kernel() is None
    finally:
        streams.gpu_kernel.cache_clear()
