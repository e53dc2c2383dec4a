"""The id of a run in a tracking tool, kept in the folder of the run, so that a resumed run continues the same one."""

import contextlib
import uuid
from pathlib import Path

from ngpt.system.atomic_files import write_atomic

FILE = "tracker_id"


def run_id(folder: Path) -> tuple[str, bool]:
    """Returns the id, and whether it is new. A run that is trained anew has another folder, and another id."""
    if (known := read_run_id(folder)) is not None:
        return known, False
    new = uuid.uuid4().hex
    with contextlib.suppress(OSError):  # of a full disk: then a resumed run is a new one in the tool
        write_atomic(folder / FILE, f"{new}\n")
    return new, True


def read_run_id(folder: Path) -> str | None:
    """Returns the id; None if the run in this folder has not been tracked."""
    try:
        return (folder / FILE).read_text(encoding="utf-8").strip()[:64]
    except FileNotFoundError:
        return None
