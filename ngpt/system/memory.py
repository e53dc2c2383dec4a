"""The peak memory of a run, also in a process that has run others, and what to do when there is none left."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

# How libraries say it that raise a plain RuntimeError; torch's allocator on CUDA has a class of its own.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
    "CUDA error: out of memory",  # outside of the allocator
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",  # no room for the code of a kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
)
_LARGE, _M_MMAP_THRESHOLD = 16 * 2**20, -3  # bytes; mallopt(3)
Value = TypeVar("Value")


def configure_allocator() -> None:
    """Memory for large tensors on a CPU: in large pages, and given back as soon as it is free."""
    enable_huge_pages()
    release_large_tensors()


def release_large_tensors() -> None:
    """Lets glibc take tensors from 16 MiB on from the kernel one by one, unless the user has said something about it.

    Of its own accord it does so only until the first is freed, and from then on cuts them from its heap, up to 32 MiB.
    The holes in it hardly ever fit the next tensor: the 13.7M recipe held 130 MB more than it used.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)


def enable_huge_pages() -> None:
    """Lets torch ask Linux for pages of 2 MiB for large tensors on a CPU, unless the user has said something about it.

    Each step takes them from the kernel anew, and 4 KiB at a time that is up to a fifth of the step. torch looks when
    it allocates its first large tensor.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement. On a CPU this works on Linux only; elsewhere the peak is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set size


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated by tensors on CUDA, else the resident set of the process, which includes Python and torch."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def free_memory(device: torch.device) -> None:
    """Gives back what is held but not in use. Call it outside of `except`: a traceback keeps its frames' tensors."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def retry_on_oom(attempt: Callable[[], Value], reduce_batch: Callable[[], bool], device: torch.device) -> Value:
    """What `attempt` returns, once there is memory for it: each time that there is not, `reduce_batch` is asked for less.

    Raises:
        RuntimeError, MemoryError: there is not enough memory, and `reduce_batch` says that it gets no smaller.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not reduce_batch():
                raise
        free_memory(device)
