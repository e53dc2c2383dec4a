"""Files of a data set on the Hugging Face hub: downloaded in parallel, resumed, checked by SHA-256.

A file has its name only once its hash is what the hub publishes for it; until then it is called `NAME.part`. The hub is
the one that `HF_ENDPOINT` names, as for huggingface_hub, or https://huggingface.co. Public data sets only: no token is
read or sent.
"""

import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ngpt.config.base import ConfigError
from ngpt.data.text.progress import Log, Meter
from ngpt.system.cache import cache_folder

HUB = "https://huggingface.co"
AT_ONCE = 4  # files
PATIENCE = 15.0  # seconds without a byte
ATTEMPTS = 6  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt; each further one waits twice as long
BLOCK = 1 << 20  # bytes
PART = ".part"
HINT = "pass a local copy with data.path (--from PATH)"

_TRANSIENT = (OSError, http.client.HTTPException)  # URLError, timeouts and broken connections are OSErrors


@dataclass(frozen=True)
class HubFile:
    """A file of a data set as the hub lists it: `path` inside of the data set, `size` in bytes."""

    path: str
    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """What it is called here: its whole path, in one folder."""
        return self.path.replace("/", "-")


def downloads_folder() -> Path:
    """Where downloads are kept: `$NGPT_CACHE/downloads`, or under ~/.cache/ngpt."""
    return cache_folder() / "downloads"


def list_hub(dataset: str, *, revision: str = "main") -> list[HubFile]:
    """The large files of a data set such as `kjj0/fineweb10B-gpt2`, sorted by path, with their published hashes.

    Source of the interface: the hub's OpenAPI description, `/api/datasets/{repo}/tree/{revision}`; a long list comes
    in pages, each of which links to the next one.

    Raises:
        ConfigError: the hub cannot be reached, or there is no such data set.
    """
    base = f"{_endpoint()}/datasets/{dataset}/resolve/{_quoted(revision)}"
    url: str | None = f"{_endpoint()}/api/datasets/{dataset}/tree/{_quoted(revision)}?recursive=true"
    found = []
    while url:
        entries, url = _ask(url)
        for entry in entries:
            if lfs := entry.get("lfs"):  # what git itself keeps, such as README.md, has no SHA-256
                path = entry["path"]
                found.append(HubFile(path, f"{base}/{urllib.parse.quote(path)}", int(lfs["size"]), lfs["oid"]))
    return sorted(found, key=lambda file: file.path)


def download(files: Sequence[HubFile], folder: Path, *, name: str, log: Log) -> list[Path]:
    """The files in `folder`; those that are there already stay.

    Of two processes that need the same files one downloads them and the other waits. What an interrupted download has
    brought is kept and continued.

    Raises:
        ConfigError: the hub cannot be reached, does not have a file, or sends something else than it publishes.
        OSError: the disk is full or not writable.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / file.name for file in files]
    with FileLock(folder / ".lock"):
        missing = [(file, path) for file, path in zip(files, paths, strict=True) if not path.exists()]
        if missing:
            _check_space(folder, missing)
            total = sum(file.size for file, _ in missing)
            log(f"{name}: downloading {len(missing)} file{'s' * (len(missing) > 1)}, {total / 1e6:,.1f} MB")
            _all_at_once(missing, Meter(log, name))
    return paths


def _all_at_once(missing: Sequence[tuple[HubFile, Path]], meter: Meter) -> None:
    stop, lock = threading.Event(), threading.Lock()
    total, there = sum(file.size for file, _ in missing), _already_there(missing)
    fresh = 0

    def arrived(count: int) -> None:
        nonlocal fresh
        with lock:
            fresh += count
            meter.update(fresh, "bytes", fraction=(there + fresh) / total, before=there / total)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [pool.submit(_fetch, file, path, stop, arrived) for file, path in missing]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()  # after an error or Ctrl-C the other threads end at their next block
            for future in running:
                future.cancel()


class _NothingNew(Exception):
    """An attempt that did not get the rest of the file; another one may."""


def _fetch(file: HubFile, path: Path, stop: threading.Event, arrived: Callable[[int], None]) -> None:
    """Downloads one file; a cut connection, a busy server and a damaged beginning are each tried again."""
    part = path.with_name(path.name + PART)
    failures, again = 0, False
    while not stop.is_set():
        before = _size(part)
        problem = ""
        if before != file.size:
            try:
                _continue(file, part, stop, arrived)
            except _NothingNew as error:
                problem = str(error)
        if stop.is_set():
            return
        if _size(part) == file.size:
            if _sha256(part) == file.sha256:
                part.replace(path)
                return
            part.unlink()
            if again:
                raise ConfigError(f"cannot download {file.url}: its SHA-256 is not {file.sha256[:12]}...; {HINT}")
            again = True  # the beginning may be of an older file: once more from the start
            continue
        failures = 1 if _size(part) > before else failures + 1
        if failures >= ATTEMPTS:
            raise ConfigError(f"cannot download {file.url}: {problem}; {HINT}")
        stop.wait(PAUSE * 2 ** (failures - 1))


def _continue(file: HubFile, part: Path, stop: threading.Event, arrived: Callable[[int], None]) -> None:
    """Appends what is missing to `part`; starts over where the server sends all of it.

    Raises:
        _NothingNew: worth another attempt.
        ConfigError: not worth one.
    """
    have = _size(part)
    if have > file.size:  # of another file of this name
        part.unlink()
        have = 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is no such range: the part is of another file
            part.unlink(missing_ok=True)
        elif not _worth_another(error.code):
            raise ConfigError(f"cannot download {file.url}: HTTP {error.code} {error.reason}; {HINT}") from None
        raise _NothingNew(f"HTTP {error.code} {error.reason}") from None
    except _TRANSIENT as error:
        raise _NothingNew(_reason(error)) from None
    with response:
        from_start = response.status != 206 or not _starts_at(response.headers.get("Content-Range"), have)
        if response.status == 206 and from_start:
            raise _NothingNew("the server sent another range than it was asked for")
        with part.open("wb" if from_start else "ab", buffering=0) as out:  # a killed process keeps what came
            while not stop.is_set():
                try:
                    block = response.read1(BLOCK)
                except _TRANSIENT as error:
                    raise _NothingNew(_reason(error)) from None
                if not block:
                    break
                out.write(block)
                arrived(len(block))
            os.fsync(out.fileno())
    if _size(part) < file.size:
        raise _NothingNew(f"the connection ended after {_size(part):,} of {file.size:,} bytes")


def _ask(url: str) -> tuple[list[dict[str, Any]], str | None]:
    """One page of a list, and the address of the next one; a busy server is asked again."""
    problem = ""
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as response:
                entries, link = json.loads(response.read()), response.headers.get("Link", "")
            following = re.search(r'<([^>]+)>;\s*rel="next"', link)
            return entries, urllib.parse.urljoin(url, following[1]) if following else None
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"HTTP {error.code} {error.reason}"
            if not _worth_another(error.code):
                break
        except (*_TRANSIENT, ValueError) as error:  # no network is said at once
            problem = _reason(error)
            break
        time.sleep(PAUSE * 2**attempt)
    raise ConfigError(f"cannot download {url}: {problem}; {HINT}")


def _worth_another(status: int) -> bool:
    """Too many requests, a time limit, or a server in trouble."""
    return status in (408, 425, 429) or status >= 500


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")


def _quoted(revision: str) -> str:
    return urllib.parse.quote(revision, safe="")  # refs/convert/parquet is one part of the address


def _starts_at(content_range: str | None, first: int) -> bool:
    return (content_range or "").startswith(f"bytes {first}-")


def _check_space(folder: Path, missing: Sequence[tuple[HubFile, Path]]) -> None:
    """Better now than after an hour."""
    needed, free = sum(file.size for file, _ in missing) - _already_there(missing), shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free", str(folder))


def _already_there(missing: Sequence[tuple[HubFile, Path]]) -> int:
    """Bytes that earlier attempts have left."""
    return sum(min(file.size, _size(path.with_name(path.name + PART))) for file, path in missing)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return " ".join(str(reason).split()) or type(error).__name__
