"""Who else can change a file: checks of the folders in which code, tokens and sockets of this user are kept.

A path is safe if every folder and every link on it belongs to this user or to root, and nobody else can write to it.
In a folder with the sticky bit, such as /tmp, others can add names but not replace ours.
Connections have owners, too.
"""

import contextlib
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MAX_LINKS = 40  # on one path, as in the kernel
PREFIX = "ngpt-"  # of the names of private folders
LOCK_FILE = "lock"  # in a private folder; locked while its process lives


def insecure_part(path: Path, *, with_contents: bool = False) -> str | None:
    """Says which part of `path` somebody else can change, as in "/x can be written by other users (mode 0777)".

    Returns None if there is none. Parts that do not exist are fine. With `with_contents`, nobody else may add files to
    `path` itself either, so the sticky bit does not help.
    """
    if not hasattr(os, "geteuid"):  # Windows has no such modes
        return None
    path = Path(os.path.abspath(path))
    parts = list(_walk(path))
    for index, (part, state) in enumerate(parts):
        is_last = index == len(parts) - 1 and path.exists()
        if state.st_uid not in (0, os.geteuid()) and (is_last or not _is_unmapped(state.st_uid)):
            return f"{part} belongs to {_user_name(state.st_uid)}"
        if stat.S_ISLNK(state.st_mode):  # the mode of a link means nothing
            continue
        is_sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX and not (is_last and with_contents)
        others = [] if is_sticky else _other_writers(state)
        if others:
            return f"{part} can be written by {others[0]} (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def insecure_content(folder: Path) -> str | None:
    """Says which file or folder below `folder` somebody else owns or can write; None if there is none."""
    if not hasattr(os, "geteuid"):
        return None
    for name, folders, files in os.walk(folder):
        for path in (Path(name, entry) for entry in (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):  # another process has replaced it
                state = path.lstat()
                if state.st_uid not in (0, os.geteuid()):
                    return f"{path} belongs to {_user_name(state.st_uid)}"
                if not stat.S_ISLNK(state.st_mode) and (others := _other_writers(state)):
                    return f"{path} can be written by {others[0]} (mode {stat.S_IMODE(state.st_mode):04o})"
    return None


def is_secret(path: Path) -> bool:
    """Whether only this user and root can read and change the file at `path`."""
    state = path.stat()
    return not state.st_mode & 0o077 and insecure_part(path) is None


def opened_by_another_user(client: tuple[str, int], server: tuple[str, int]) -> bool:
    """Whether another user than root has opened the connection between two IPv4 addresses of this machine.

    Linux lists the owner of each socket. False if it is not listed: then no user of this machine has opened it, as with
    browsers of Windows in WSL, or there is no list, as on macOS.
    """
    try:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return False
    ends = [
        f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}" for host, port in (client, server)
    ]
    owners = [int(row[7]) for row in rows if row[1:3] == ends]
    return any(owner not in (0, os.geteuid()) for owner in owners)


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that the kernel passes on the way to an absolute path, and what is there."""
    current, rest, links = Path(path.anchor), list(path.parts[1:]), 0
    yield current, current.lstat()
    while rest:
        part = rest.pop(0)
        if part == "..":
            current = current.parent
            continue
        found = current / part
        try:
            state = found.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        yield found, state
        if not stat.S_ISLNK(state.st_mode):
            current = found
            continue
        links += 1
        if links > MAX_LINKS:
            return  # a circle, which nothing can be opened through
        target = Path(os.readlink(found))
        current = Path(target.anchor) if target.is_absolute() else current
        rest[:0] = target.parts[1:] if target.is_absolute() else target.parts


def _other_writers(state: os.stat_result) -> list[str]:
    others = ["other users"] if state.st_mode & stat.S_IWOTH else []
    if state.st_mode & stat.S_IWGRP and not _is_own_group(state.st_gid):
        others.append(f"the group {_group_name(state.st_gid)}")
    return others


def _is_own_group(gid: int) -> bool:
    """Whether a group is the private group of this user, which many systems create beside each user (umask 002).

    The private group has the user's name and no other member. Root has none.
    """
    import grp
    import pwd

    if os.geteuid() == 0:
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return user.pw_gid == gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _is_unmapped(uid: int) -> bool:
    """Whether `uid` stands for the users of the host in a container of an ordinary user, such as Apptainer's.

    There the folders of the host's root seem to belong to nobody.
    """
    with contextlib.suppress(OSError):
        mapping = Path("/proc/self/uid_map").read_text().split()
        overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
        return uid == overflow and mapping != ["0", "0", "4294967295"]
    return False


def _user_name(uid: int) -> str:
    import pwd

    with contextlib.suppress(KeyError):
        return f"the user {pwd.getpwuid(uid).pw_name}"
    return f"user {uid}"


def _group_name(gid: int) -> str:
    import grp

    with contextlib.suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)


class PrivateFolder:
    """A new folder that only this user can enter, locked until `remove` or the end of this process."""

    def __init__(self, parent: Path) -> None:
        import fcntl

        self.path, self._pid = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)), os.getpid()  # mode 0700
        # Locked before it has its final name, so that `remove_abandoned` of another process never finds it unlocked.
        unlocked = self.path / f"{LOCK_FILE}.new"
        self._lock = os.open(unlocked, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with contextlib.suppress(OSError):  # not every file system has locks; then nobody else can lock it either
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unlocked.rename(self.path / LOCK_FILE)

    def release(self) -> None:
        """Leaves the folder for the next `remove_abandoned`."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Removes the folder, as far as possible. In a child made by `fork` this does nothing."""
        if os.getpid() != self._pid:
            return
        _remove(self.path)
        self.release()


def _remove(folder: Path) -> None:
    """Removes a private folder as far as possible, its lock file last: without it, nobody would remove the rest."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)  # follows no links
            elif path.name != LOCK_FILE:
                path.unlink()
        if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> int:
    """Removes the private folders in `parent` whose processes were killed; returns their number.

    Only folders of this user that nobody else can enter and nobody has locked are removed. Links are not followed.
    """
    import fcntl

    removed = 0
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or removed by another process
            state = folder.lstat()
            if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid() or state.st_mode & 0o077:
                continue
            lock = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)
                removed += not folder.exists()
            finally:
                os.close(lock)
    return removed
