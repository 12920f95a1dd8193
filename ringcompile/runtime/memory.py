"""Memory of a rank's process: freed buffers are kept for the next step.

A step frees and allocates the same large buffers again and again. Returned to the system each
time, every one costs page faults at its next first touch: a few percent of a step on a CPU.
"""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

# From glibc's malloc.h: sizes from which blocks are mapped singly, and above which free memory
# at the end of the heap is given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 1 << 30


def keep_freed_memory() -> None:
    """Ask the C library, where it is glibc, to keep freed memory in this process."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _NEVER)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: of the device, or for the CPU this process' resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
