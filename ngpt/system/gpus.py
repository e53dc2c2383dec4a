"""The GPUs of this process. Every question about them that torch answers is asked here, and nowhere else.

Which kernel suits a tensor is another question: the code that chooses one reads the device of the tensor.
"""

import torch


def is_available() -> bool:
    """Whether torch can use a GPU: it was built for one, the driver works, and at least one is visible."""
    return torch.cuda.is_available()


def is_built() -> bool:
    """Whether this torch was built for GPUs of NVIDIA (CUDA) or AMD (ROCm)."""
    return torch.version.cuda is not None or torch.version.hip is not None


def count() -> int:
    """The number of GPUs that are visible to this process; 0 without CUDA."""
    return torch.cuda.device_count()


def current() -> torch.device:
    """The device that tensors of this process are put on."""
    return torch.device("cuda")


def is_gpu(device: torch.device) -> bool:
    """Whether a device is a GPU that the functions of this module know."""
    return device.type == "cuda"


def name(device: torch.device | int) -> str:
    """The name of a GPU, such as `NVIDIA H200`; a number counts the visible ones."""
    return torch.cuda.get_device_name(device)


def is_in_use() -> bool:
    """Whether this process has a context on a GPU, which a failure may have damaged."""
    return torch.cuda.is_initialized()


def memory(device: torch.device) -> tuple[int, int]:
    """The free and the total bytes of a GPU; what other processes hold is not free."""
    return torch.cuda.mem_get_info(device)


def limit_memory(share: float) -> None:
    """Limits this process to a share of the memory of its current GPU."""
    # Unlike other functions of torch, this one does not accept `cuda` without an index.
    torch.cuda.set_per_process_memory_fraction(share)


def reset_peaks(device: torch.device) -> None:
    """Makes `peak_allocated` and `peak_reserved` start again at what is held now."""
    torch.cuda.reset_peak_memory_stats(device)


def peak_allocated(device: torch.device) -> int:
    """The peak bytes of the tensors of this process."""
    return torch.cuda.max_memory_allocated(device)


def peak_reserved(device: torch.device) -> int:
    """The peak bytes that torch's allocator has taken from the GPU for this process."""
    return torch.cuda.max_memory_reserved(device)


def release_unused() -> None:
    """Returns memory that holds no tensor from torch's allocator to the GPU."""
    torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has run everything that this process has queued on it."""
    torch.cuda.synchronize(device)
