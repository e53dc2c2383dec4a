"""Builds the C++ kernels beside this file at first use and loads them from the cache folder.

The folder is one that only this user can write (ngpt/system/cache.py), since what is loaded there runs as this user.
A library's file name contains a hash of its sources and of the compiler flags that -march=native expands to here.
"""

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import uuid
from pathlib import Path

from ngpt.system.cache import code_folder

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),  # GCC vectorizes the loops only with these
)
log = logging.getLogger(__name__)


@functools.cache
def load_native(name: str) -> ctypes.CDLL | None:
    """Builds `name`.cpp if needed and loads it; logs a warning and returns None if it cannot be built."""
    source, compiler = Path(__file__).with_name(f"{name}.cpp"), os.environ.get("CXX", "g++")
    try:
        expanded = subprocess.run([compiler, *FLAGS, "-E", "-###", source], capture_output=True, check=True).stderr
        contents = [file.read_bytes() for file in (source, *sorted(source.parent.glob("*.h")))]
        digest = hashlib.sha256(b"\0".join([*contents, expanded])).hexdigest()[:16]
        target = code_folder("native") / f"{name}-{digest}.so"
        if not target.exists():
            _build(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error).encode()
        log.warning("%s was not built; using a slower path: %s", source.name, reason.decode(errors="replace")[-500:])
        return None


def _build(compiler: str, source: Path, target: Path) -> None:
    temp = target.with_suffix(f".{uuid.uuid4().hex}.tmp")  # unique, since another process may build the same library
    try:
        subprocess.run([compiler, *FLAGS, "-o", temp, source], capture_output=True, check=True)
        temp.chmod(temp.stat().st_mode & ~0o022)  # with a umask of 0, code_folder would not trust it again
        temp.replace(target)
    finally:
        temp.unlink(missing_ok=True)
