"""Peak memory per run, allocator settings, and retries with smaller batches when memory runs out."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

# Messages of libraries that raise a plain RuntimeError; torch's CUDA allocator has its own class.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUDA error: out of memory",  # outside torch's allocator
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",  # for the code of a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
)
_LARGE, _M_MMAP_THRESHOLD = 16 * 2**20, -3  # bytes; mallopt(3)
Value = TypeVar("Value")


def configure_allocator() -> None:
    """Sets up CPU memory for large tensors, unless the user has configured it. Call it before the first one.

    Torch requests 2 MiB pages from Linux: mapping 4 KiB pages again in each step takes up to a fifth of it. And glibc
    maps each tensor of at least 16 MiB separately and returns it when it is free. By default it raises this threshold
    after the first large free, up to 32 MiB, and fragments its heap: the 13.7M recipe held 130 MB more than it used.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement. On a CPU it needs Linux; elsewhere the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of tensors on CUDA, else the resident set of the process, including Python and torch."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a failed allocation on the device or the host."""
    of_library = isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    return of_library or isinstance(error, torch.OutOfMemoryError | MemoryError)


def free_memory(device: torch.device) -> None:
    """Returns unused memory to the system. Call it outside `except`: a traceback keeps the tensors of its frames."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def retry_on_oom(attempt: Callable[[], Value], reduce_batch: Callable[[], bool], device: torch.device) -> Value:
    """The result of `attempt`. Whenever memory runs out, calls `reduce_batch`; raises if that returns False."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not reduce_batch():
                raise
        free_memory(device)
