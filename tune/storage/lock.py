"""Lock of a results directory, so that only one process at a time runs its campaign."""

from pathlib import Path

from ngpt.system import lock
from ngpt.system.lock import FolderLock, FolderLocked

NAME = "campaign"  # the files are `campaign.lock` and `campaign.pid`

ResultsLocked = FolderLocked


class ResultsLock(FolderLock):
    """Lock of a results directory."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, NAME)


def is_locked(root: Path) -> bool:
    """Whether a live process runs the campaign in this results directory."""
    return lock.is_locked(root, NAME)


def refuse_if_running(root: Path) -> None:
    """Raises `ResultsLocked` if another process runs the campaign. Call it before slow imports."""
    lock.refuse_if_locked(root, NAME)
