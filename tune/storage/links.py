"""Links in a results directory, which may have been made by somebody else, and lead to other files of the user."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

REASON = "it is a link, and a run would write to its target"
NOT_FOLLOWED = "it is a link, and could lead to any file; replace it with the file that it stands for"


def refuse_links(root: Path, reason: str = REASON) -> None:
    """Raises OSError if a run in `root` would write, or a report read, through a link that may not be its user's.

    The results directory and `trials` may be links, as to a larger disk, if they belong to this user or to root. The
    folders of trials and what is in them may not: nobody makes such a link by hand, and one from an archive that
    somebody else has made belongs to whoever unpacks it.
    """
    for path in (root, root / "trials"):
        if path.is_symlink() and path.lstat().st_uid not in (0, os.geteuid()):
            raise OSError(errno.ELOOP, f"{reason}; it belongs to another user", str(path))
    for path in links_of_trials(root):
        raise OSError(errno.ELOOP, reason, str(path))


def links_of_trials(root: Path) -> Iterator[Path]:
    """Yields the links of a results directory that are trials, or in the folder of one, sorted."""
    for trial in _entries(root / "trials"):
        if trial.is_symlink():
            yield Path(trial.path)
        elif trial.is_dir():
            yield from (Path(entry.path) for entry in _entries(Path(trial.path)) if entry.is_symlink())


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)
