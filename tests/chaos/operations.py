"""Records every change that this process makes below a folder, and lets any one of them fail.

The hook sits where Python meets the operating system: `open`, raw writes, and the functions of `os` that create,
rename, remove and sync. So the production code needs no changes, and writes of libraries (torch, pyarrow) are recorded
too. A check replays the log and compares the files (tests/chaos/disk.py). Linux only: the name of an open file comes
from /proc.
"""

import builtins
import errno
import io
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


class Operation(NamedTuple):
    """A change of the disk. Paths are relative to the watched folder, which is `.` itself."""

    kind: str  # open (that creates or truncates), write, truncate, fsync, rename, unlink, mkdir, rmdir
    path: str
    to: str = ""  # of a rename
    offset: int = 0  # of a write; the new length of a truncate
    data: bytes = b""


class Fault(NamedTuple):
    """One of FAULTS at operation number `at`."""

    name: str
    at: int

    def __str__(self) -> str:
        return f"{self.name}@{self.at}"

    def hits(self, number: int, operation: Operation) -> bool:
        """Whether it hits this operation."""
        here = number == self.at or (self.name == "full" and number > self.at)
        return here and operation.kind in FAULTS[self.name]


# Operations that each fault may hit. A full disk still allows files to be removed and synced.
TAKES_SPACE = ("open", "write", "rename", "mkdir")
EVERY = (*TAKES_SPACE, "truncate", "fsync", "unlink", "rmdir")
FAULTS = {
    "kill": EVERY,  # before the operation
    "half": ("write",),  # killed with half of the bytes written
    "enospc": (*TAKES_SPACE, "fsync"),  # once; some file systems find out when they sync
    "eio": EVERY,  # once
    "full": TAKES_SPACE,  # no space from here to the end of the run
}
ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "full": errno.ENOSPC}


class Watch:
    """Patches this process: changes below `root` are logged to `log` before they happen, and may hit `fault`."""

    def __init__(self, root: Path, log: Path, fault: Fault | None) -> None:
        self._root = os.path.realpath(root)
        self._fault, self._count = fault, 0
        self._short: str | None = None  # a file with half of a write done: the rest fails
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in HOOKED}
        self._open = io.open
        self._log = self._real["open"](log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def install(self) -> None:
        """Installs the hooks, for the rest of the process."""
        builtins.open = io.open = self.open_file  # type: ignore[assignment]
        for name in HOOKED:
            setattr(os, name, getattr(self, name))

    def name(self, path: Any, folder: int | None = None) -> str | None:
        """A path or file descriptor as a path relative to the root, or None if it is outside."""
        if isinstance(path, int):
            full = os.readlink(f"/proc/self/fd/{path}")
        else:
            base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
            full = os.path.normpath(os.path.join(base, os.fsdecode(path)))
            full = os.path.join(os.path.realpath(os.path.dirname(full)), os.path.basename(full))
        if full == self._root:
            return "."
        return full[len(self._root) + 1 :] if full.startswith(self._root + "/") else None

    # ---- an operation ----------------------------------------------------------------------------------------------

    def before(self, operation: Operation, size: int = 0) -> int | None:
        """Logs an operation, or lets it fail. Returns how many of the `size` bytes of a write to write; None: all."""
        number, self._count = self._count, self._count + 1
        fault = self._fault
        if self._short == operation.path and operation.kind == "write":
            self._short = None
            self._fail(operation)
        if fault is not None and fault.hits(number, operation):
            if fault.name == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if operation.kind != "write" or size < 2:
                self._fail(operation)
            # Like the kernel: first a short write, then the error.
            self._short = operation.path if fault.name != "full" else None
            self._note(operation._replace(data=operation.data[: size // 2]))
            return size // 2
        self._note(operation)
        return None

    def _fail(self, operation: Operation) -> None:
        assert self._fault is not None
        if self._fault.name == "half":
            os.kill(os.getpid(), signal.SIGKILL)
        number = ERRORS[self._fault.name]
        raise OSError(number, os.strerror(number), os.path.join(self._root, operation.path))

    def _note(self, operation: Operation) -> None:
        self._real["write"](self._log, pickle.dumps(tuple(operation)))

    # ---- the hooks -------------------------------------------------------------------------------------------------

    def open_file(
        self,
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        """`open` on top of a raw file whose writes are recorded."""
        path = None if isinstance(file, int) or not set(mode) & set("wax+") else self.name(file)
        if path is None:
            return self._open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if set(mode) & set("wx") or not os.path.exists(file):
            self.before(Operation("open", path))
        raw = Watched(self, file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = io.BufferedRandom(raw, size) if "+" in mode else io.BufferedWriter(raw, size)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self.name(path, dir_fd) if flags & (os.O_CREAT | os.O_TRUNC) else None
        if name is not None and (flags & os.O_TRUNC or not os.path.exists(os.path.join(self._root, name))):
            self.before(Operation("open", name))
        return self._real["open"](path, flags, mode, dir_fd=dir_fd)

    def write(self, fd: int, data: bytes) -> int:
        name = self.name(fd)
        if name is None:
            return self._real["write"](fd, data)
        offset = os.lseek(fd, 0, os.SEEK_CUR)
        part = self.before(Operation("write", name, offset=offset, data=bytes(data)), len(data))
        return self._real["write"](fd, data if part is None else data[:part])

    def ftruncate(self, fd: int, length: int) -> None:
        if (name := self.name(fd)) is not None:
            self.before(Operation("truncate", name, offset=length))
        self._real["ftruncate"](fd, length)

    def fsync(self, fd: int) -> None:
        if (name := self.name(fd if isinstance(fd, int) else fd.fileno())) is not None:
            self.before(Operation("fsync", name))
        self._real["fsync"](fd)

    def rename(self, old: Any, new: Any, **folders: Any) -> None:
        self._rename("rename", old, new, folders)

    def replace(self, old: Any, new: Any, **folders: Any) -> None:
        self._rename("replace", old, new, folders)

    def _rename(self, function: str, old: Any, new: Any, folders: dict[str, Any]) -> None:
        source, target = self.name(old), self.name(new)
        if source is not None and target is not None:
            self.before(Operation("rename", source, to=target))
        self._real[function](old, new, **folders)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def remove(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def _remove(self, kind: str, path: Any, dir_fd: int | None) -> None:
        name = self.name(path, dir_fd)
        if name is not None and os.path.lexists(os.path.join(self._root, name)):
            self.before(Operation(kind, name))
        self._real[kind](path, dir_fd=dir_fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = self.name(path, dir_fd)
        if name is not None and not os.path.lexists(os.path.join(self._root, name)):
            self.before(Operation("mkdir", name))
        self._real["mkdir"](path, mode, dir_fd=dir_fd)


HOOKED = ("open", "write", "ftruncate", "fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")


class Watched(io.FileIO):
    """A raw file whose writes are recorded."""

    def __init__(self, watch: Watch, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._watch, self._appends = watch, "a" in mode

    def write(self, data: Any, /) -> int:
        content = bytes(data)
        name = self._watch.name(self.fileno())
        if name is None:
            return super().write(content)
        offset = os.fstat(self.fileno()).st_size if self._appends else self.tell()
        part = self._watch.before(Operation("write", name, offset=offset, data=content), len(content))
        return super().write(content if part is None else content[:part])

    def truncate(self, size: int | None = None, /) -> int:
        length = self.tell() if size is None else size
        if (name := self._watch.name(self.fileno())) is not None:
            self._watch.before(Operation("truncate", name, offset=length))
        return super().truncate(length)


def read_log(path: Path) -> list[Operation]:
    """The recorded operations, in order."""

    def entries() -> Iterator[Operation]:
        with path.open("rb") as file, suppress(EOFError):
            while True:
                yield Operation(*pickle.load(file))

    return list(entries())
