"""Peak memory per run, allocator settings, and retries with smaller batches after running out of memory."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ngpt.system import gpus

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

# In the messages of a RuntimeError. Torch's own allocator raises OutOfMemoryError, but drivers and libraries do not.
_OOM_MESSAGE = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"  # on Linux, on Windows
    r"|\b(CUDA|HIP|XPU|MPS backend)( driver)?( error:)? out of memory"
    r"|Triton Error \[\w+\]: .*out of memory"  # when loading a kernel
    r"|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|hipErrorOutOfMemory"
    # A library creates its handle, which needs memory, at the first call; without it, it is not initialized.
    r"|(CU|HIP|ROC)(BLAS|DNN|SOLVER|SPARSE|FFT)_STATUS_(\w*ALLOC(ATION)?_FAILED|NOT_INITIALIZED)"
    r"|rocblas_status_memory_error|miopenStatus(AllocFailed|NotInitialized)"
    r"|std::bad_alloc"
)
_M_MMAP_THRESHOLD = -3  # option of mallopt(3)
_MMAP_BYTES = 16 * 2**20
Value = TypeVar("Value")


def configure_allocator() -> None:
    """Configures CPU memory for large tensors, unless the user has. Call it before creating the first tensor.

    Makes torch request 2 MiB pages from Linux, since mapping 4 KiB pages takes up to a fifth of each step. Makes glibc
    map each tensor of at least 16 MiB separately and unmap it when it is freed. By default glibc raises this threshold
    up to 32 MiB and fragments its heap: the 13.7M recipe held 130 MB more than it used.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has no mallopt
    if mallopt is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


def reset_peak_memory(device: torch.device) -> None:
    """Resets `peak_memory`. Without CUDA or Linux it has no effect, so the peak is that of the whole process."""
    if gpus.is_gpu(device):
        gpus.reset_peaks(device)
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size


def peak_memory(device: torch.device) -> int:
    """Returns peak bytes: of tensors on CUDA, else of the resident set of the process, with Python and torch."""
    if gpus.is_gpu(device):
        return gpus.peak_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it wraps, is a failed allocation on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, RuntimeError) and _OOM_MESSAGE.search(str(error)):
        return True
    # The compiler raises its errors without a cause, and keeps the original one in this attribute.
    wrapped = getattr(error, "inner_exception", None) or error.__cause__
    return isinstance(wrapped, BaseException) and is_out_of_memory(wrapped)


def free_memory(device: torch.device) -> None:
    """Releases unused memory. Call it outside `except`, where the traceback keeps tensors alive."""
    gc.collect()
    if gpus.is_gpu(device):
        gpus.release_unused()
    elif device.type == "mps":
        torch.mps.empty_cache()


def retry_on_oom(attempt: Callable[[], Value], reduce_batch: Callable[[], bool], device: torch.device) -> Value:
    """Returns the result of `attempt`. If memory runs out, tries again if `reduce_batch` returns True, else raises."""
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not reduce_batch():
                raise
        free_memory(device)
