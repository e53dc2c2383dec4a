"""Selects the device and the precision."""

import torch

from ngpt.config.base import ConfigError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """The named device; `auto` is CUDA, then Apple's MPS, then the CPU. Raises ConfigError if it is not here."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if here[kind]))
    if not here[name]:
        there = ", ".join(kind for kind, present in here.items() if present)
        raise ConfigError(f"device {name!r} is not available here; this machine has {there}")
    return torch.device(name)


def mixed_precision(device: torch.device, dtype: str) -> torch.autocast:
    """Autocast that computes matrix products in `dtype`, one of `DTYPES`; does nothing for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
