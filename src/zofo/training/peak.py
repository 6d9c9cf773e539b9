"""The memory that this process, or the allocator of its GPU, takes: now, at its peak, and what is free."""

import contextlib
import sys
from pathlib import Path

import psutil
import torch

_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement of `peak_memory`, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR_PEAK.exists():
        with contextlib.suppress(OSError):  # some containers forbid it; the peak then includes what came before
            _CLEAR_PEAK.write_text("5")  # Linux: sets the peak of this process to what it uses now


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak since `reset_peak_memory`: of torch's allocator on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM:")), None)
    if peak is not None:
        return int(peak) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows does not have

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def resident_memory(device: torch.device) -> int:
    """Bytes of this process on a CPU; 0 where a GPU's allocator is measured, which holds no libraries."""
    return 0 if device.type == "cuda" else psutil.Process().memory_info().rss


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had there."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
