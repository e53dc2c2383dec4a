"""Selects the device and the precision."""

import torch

from ngpt.config.base import ConfigError
from ngpt.system import gpus

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(name: str) -> torch.device:
    """Returns the named device; `auto` prefers CUDA, then Apple's MPS. Raises ConfigError if it is not available."""
    available = {"cpu": True, "cuda": gpus.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if not available[name]:
        choices = ", ".join(kind for kind, present in available.items() if present)
        reason = f": {gpus.why_unavailable()}" if name == "cuda" else ""
        raise ConfigError(f"device {name!r} is not available; this machine has {choices}{reason}")
    return gpus.current() if name == "cuda" else torch.device(name)


def mixed_precision(device: torch.device, dtype: str) -> torch.autocast:
    """Returns an autocast context for bfloat16 matrix products, or one that does nothing if `dtype` is float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")
