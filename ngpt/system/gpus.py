"""The GPUs of this process. Every question about them that torch answers is asked here, and nowhere else.

Which kernel suits a tensor is another question: the code that chooses one reads the device of the tensor.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

# Where the drivers of NVIDIA and AMD show themselves.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/dev/kfd"))
# By which variables a process is given some of the GPUs, or none.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
HIDING = ("", "-1")  # values that show none


def is_available() -> bool:
    """Whether torch can use a GPU: it was built for one, the driver works, and at least one is visible."""
    return torch.cuda.is_available()


def is_built() -> bool:
    """Whether this torch was built for GPUs of NVIDIA (CUDA) or AMD (ROCm)."""
    return torch.version.cuda is not None or torch.version.hip is not None


def has_driver() -> bool:
    """Whether this machine has a GPU driver, whether or not torch can use it."""
    return any(path.exists() for path in DRIVERS) or shutil.which("nvidia-smi") is not None


def why_unavailable() -> str:
    """Why torch can use no GPU, as a clause."""
    if not is_built():
        return "this torch is built without CUDA"
    if not has_driver():
        return "no GPU driver is installed"
    for variable in VISIBLE:
        if (value := os.environ.get(variable)) is not None:
            effect = "hides every GPU" if value.strip() in HIDING else "names no GPU that torch can use"
            return f"{variable} is {value!r}, which {effect}"
    return "the GPU driver does not work with this torch"


def is_hidden() -> bool:
    """Whether a variable hides all GPUs from this process: it is empty or -1."""
    return any(os.environ.get(variable, "0").strip() in HIDING for variable in VISIBLE)


def select(gpus: Sequence[tuple[str, str]], visible: str | None) -> list[str]:
    """The indices of the GPUs, given as (index, UUID), that CUDA shows a process with CUDA_VISIBLE_DEVICES=`visible`.

    CUDA reads the list up to its first entry that names no GPU, so an empty text and `-1` hide all of them. A UUID may
    be shortened. A slice of a GPU (MIG) is no entry of `gpus`.
    """
    if visible is None:
        return [index for index, _ in gpus]
    chosen: list[str] = []
    for entry in map(str.strip, visible.split(",")):
        named = [i for i, uuid in gpus if entry == i or (entry.startswith("GPU-") and uuid.startswith(entry))]
        if len(named) != 1:
            break
        chosen += named
    return chosen


def count() -> int:
    """The number of GPUs that are visible to this process; 0 without CUDA."""
    return torch.cuda.device_count()


def current() -> torch.device:
    """The device that tensors of this process are put on."""
    return torch.device("cuda")


def use(index: int) -> None:
    """Makes one of the visible GPUs the current one of this process."""
    torch.cuda.set_device(index)


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


def is_usable() -> bool:
    """Whether this process can still use its GPU: a failed assertion in a kernel, for example, stays until it ends."""
    if not is_in_use():
        return True
    try:
        synchronize(current())
    except RuntimeError:
        return False
    return True


def visible_ids() -> list[str]:
    """The GPUs of this process by the names that `choose` takes; empty if torch cannot use them."""
    if not is_available():
        return []
    chosen = [word.strip() for word in os.environ.get(_visible_variable(), "").split(",") if word.strip()]
    if chosen and all(word.startswith("MIG-") for word in chosen):
        return chosen  # a process can use only the first of them, but each process can get one of its own
    return chosen[: count()] if chosen else [str(i) for i in range(count())]


def choose(name: str) -> None:
    """Makes a GPU the only one that this process sees. Call it before anything else asks for GPUs."""
    assert not is_in_use(), "the GPU of a process cannot be changed once it is in use"
    os.environ[_visible_variable()] = name


def _visible_variable() -> str:
    return "HIP_VISIBLE_DEVICES" if torch.version.hip else "CUDA_VISIBLE_DEVICES"
