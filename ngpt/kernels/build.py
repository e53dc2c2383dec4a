"""Loops of ours in C++, built at first use: the ones that torch.compile leaves slow on a CPU.

torch.compile needs a C++ compiler there anyway. What is built lies in the cache folder, under a digest of the source
and of what the compiler makes of its flags on this machine, so that several machines may share the folder.
"""

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import uuid
from pathlib import Path

from ngpt.system.cache import cache_folder

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),  # else its loops are not vectorised
)
log = logging.getLogger(__name__)


@functools.cache
def load_native(name: str) -> ctypes.CDLL | None:
    """The library built from `name`.cpp beside this file; None, with a warning, where it cannot be built."""
    source, compiler = Path(__file__).with_name(f"{name}.cpp"), os.environ.get("CXX", "g++")
    try:
        plan = subprocess.run([compiler, *FLAGS, "-E", "-###", source], capture_output=True, check=True).stderr
        parts = [source, *sorted(source.parent.glob("*.h"))]
        digest = _digest(*(part.read_bytes() for part in parts), plan)
        target = cache_folder() / "native" / f"{name}-{digest}.so"
        if not target.exists():
            _build(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        log.warning("%s was not built, a slower way is taken: %s", source.name, reason.decode(errors="replace")[-500:])
        return None


def _build(compiler: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_suffix(f".{uuid.uuid4().hex}.tmp")  # another worker may be at it as well
    try:
        subprocess.run([compiler, *FLAGS, "-o", temp, source], capture_output=True, check=True)
        temp.replace(target)
    finally:
        temp.unlink(missing_ok=True)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
