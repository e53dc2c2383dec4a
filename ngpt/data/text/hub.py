"""Downloads files of data sets of the Hugging Face hub, and others by URL: in parallel, resumable, checked by SHA-256.

huggingface_hub (the extra `hf`) finds the files, signs in and retries. Its own download drops a partial file when the
process dies and does not verify the hash, so the loop over byte ranges is here. A file is called `NAME.part` until its
hash is the published one.
"""

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ngpt.config.base import ConfigError, printable
from ngpt.data.text.progress import Log, Meter
from ngpt.system.atomic_files import naming

PARALLEL_FILES = 4
TIMEOUT = 15.0  # seconds without a byte
RETRIES = 5  # of one range
FIRST_PAUSE = 1.0  # seconds before the first retry; doubles up to 8
RANGE = 16 << 20  # bytes of a request; a killed process loses at most this much of a file
PART = ".part"
MAX_REASON_LENGTH = 300  # characters
HINT = "pass a local copy with data.path (--from PATH)"


@dataclass(frozen=True)
class HubFile:
    """A file of a data set as the hub lists it: `path` inside the data set, `size` in bytes.

    Git keeps small files itself: these have no `sha256`, but a `blob_id`, git's SHA-1 of their content.
    """

    path: str
    url: str
    size: int
    sha256: str | None
    blob_id: str | None = None

    @property
    def name(self) -> str:
        """The file name in the download folder: the path with `-` instead of `/`."""
        return self.path.replace("/", "-")


@dataclass(frozen=True)
class HubListing:
    """What the hub says of a data set at one commit. `configs` are the subsets that its README declares."""

    commit: str
    files: list[HubFile]  # by path
    configs: list[dict[str, Any]]


def list_hub(dataset: str, *, revision: str = "main") -> list[HubFile]:
    """Lists the large files of a data set such as `kjj0/fineweb10B-gpt2` by path. ConfigError if that fails."""
    return [file for file in read_listing(dataset, revision).files if file.sha256 is not None]


def read_listing(dataset: str, revision: str, *, pin: bool = False) -> HubListing:
    """Asks the hub for the files of a data set. ConfigError if that fails.

    With `pin`, their URLs name the commit, so that they stay the same when the revision moves on.
    """
    endpoint = _endpoint()
    with _advising(HINT), _errors_of(f"the file list of {dataset}"):
        # Before the import, unless the user has decided: telemetry would ask the hub for a list of AI agents first.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from huggingface_hub import HfApi, hf_hub_url

        info = HfApi(endpoint).dataset_info(dataset, revision=revision, files_metadata=True, timeout=TIMEOUT)
        if info.sha is None:
            raise ValueError("the hub does not say which commit it is")
        at = info.sha if pin else revision
        files = [
            HubFile(
                path=file.rfilename,
                url=hf_hub_url(dataset, file.rfilename, repo_type="dataset", revision=at, endpoint=endpoint),
                size=(file.lfs.size if file.lfs else file.size) or 0,
                sha256=file.lfs.sha256 if file.lfs else None,
                blob_id=None if file.lfs else file.blob_id,
            )
            for file in info.siblings or ()
        ]
        card = info.card_data.to_dict() if info.card_data else {}
    configs = [config for config in card.get("configs") or () if isinstance(config, dict)]
    return HubListing(info.sha, sorted(files, key=lambda file: file.path), configs)


def find_file(url: str, *, sha256: str, hint: str) -> HubFile:
    """Asks a server for the size of a file with a known digest. ConfigError, which ends with `hint`, if that fails."""
    with _advising(hint), _errors_of(url):
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        response = http_backoff("HEAD", url, headers=_headers(url) | {"Accept-Encoding": "identity"}, **_patience())
        hf_raise_for_status(response)
        size = response.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise ValueError("the server does not say how large it is")
    return HubFile(url.rpartition("/")[2], url, int(size), sha256)


def download(files: Sequence[HubFile], folder: Path, *, name: str, log: Log, hint: str = HINT) -> list[Path]:
    """Downloads files into `folder`, except those that are already there, and returns their paths.

    Of two processes that need the same files, one downloads them and the other waits. An interrupted download keeps
    what it has, and the next one continues there. Raises ConfigError, which ends with `hint`, if the server does not
    send what is published.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / file.name for file in files]
    with FileLock(folder / ".lock"), _advising(hint):
        missing = [(file, path) for file, path in zip(files, paths, strict=True) if not path.exists()]
        if missing:
            parts = [(file, path.with_name(path.name + PART)) for file, path in missing]
            total = sum(file.size for file, _ in missing)
            resumed = sum(min(file.size, part.stat().st_size) for file, part in parts if part.exists())
            free = shutil.disk_usage(folder).free
            if total - resumed > free:  # reported before the first byte, not after an hour
                problem = f"{(total - resumed) / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free"
                raise OSError(errno.ENOSPC, problem, str(folder))
            log(f"{name}: downloading {len(missing)} file{'s' * (len(missing) > 1)}, {total / 1e6:,.1f} MB")
            _download_in_parallel(missing, Meter(log, name), total=total, resumed=resumed)
    return paths


def _download_in_parallel(missing: Sequence[tuple[HubFile, Path]], meter: Meter, *, total: int, resumed: int) -> None:
    stop, lock = threading.Event(), threading.Lock()
    fresh = 0

    def arrived(count: int) -> None:
        nonlocal fresh
        with lock:
            fresh += count
            meter.update(fresh, "bytes", fraction=(resumed + fresh) / total, before=resumed / total)

    with ThreadPoolExecutor(PARALLEL_FILES) as pool:
        running = [pool.submit(_download_file, file, path, stop, arrived) for file, path in missing]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()  # after an error or Ctrl-C the other threads end after their current range
            for future in running:
                future.cancel()


def _download_file(file: HubFile, path: Path, stop: threading.Event, arrived: Callable[[int], None]) -> None:
    part = path.with_name(path.name + PART)
    for _ in range(2):  # a partial file may be of an older version: once more from the start
        with naming(part), part.open("ab") as out:
            while out.tell() < file.size and not stop.is_set():
                data = _read_range(file, out.tell())
                out.write(data)
                out.flush()
                arrived(len(data))
            os.fsync(out.fileno())
        if stop.is_set():
            return
        if _digest(part, file) == (file.sha256 or file.blob_id):
            part.replace(path)
            return
        part.unlink()
    expected = f"SHA-256 is not {file.sha256[:12]}" if file.sha256 else f"git id is not {(file.blob_id or '')[:12]}"
    raise ConfigError(f"cannot download {file.url}: its {expected}...")


def _digest(path: Path, file: HubFile) -> str:
    """The digest of a downloaded file by which the hub publishes it."""
    header = b"" if file.sha256 else b"blob %d\0" % path.stat().st_size
    digest = hashlib.sha256(header) if file.sha256 else hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as whole:
        return hashlib.file_digest(whole, lambda: digest).hexdigest()


def _read_range(file: HubFile, start: int) -> bytes:
    """Reads 1 to `RANGE` bytes of `file` from `start`, or all the rest if the server ignores ranges."""
    with _errors_of(file.url):
        from huggingface_hub.utils import hf_raise_for_status, http_backoff

        response = http_backoff(
            "GET",
            file.url,
            headers=_headers(file.url) | {"Range": f"bytes={start}-{min(start + RANGE, file.size) - 1}"},
            **_patience(),
        )
        hf_raise_for_status(response)
        data = response.content if response.status_code == 206 else response.content[start:]
        if not data:
            raise EOFError(f"the file ended after {start:,} of {file.size:,} bytes")
    return data


def _patience() -> dict[str, Any]:
    return {"timeout": TIMEOUT, "max_retries": RETRIES, "base_wait_time": FIRST_PAUSE}


def _endpoint() -> str | None:
    """The hub that the user has set; None: the library's own."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _headers(url: str) -> dict[str, str]:
    """The headers of the library. Only the hub gets the token of the user, not another server."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers

    is_of_hub = url.startswith(f"{_endpoint() or constants.ENDPOINT}/")
    return build_hf_headers(token=None if is_of_hub else False)


@contextmanager
def _advising(hint: str) -> Iterator[None]:
    """Ends the message of a ConfigError with what else the user can do."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}; {hint}") from error.__cause__


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Converts every error of the library and its HTTP client to a one-line ConfigError."""
    try:
        yield
    except ImportError:
        raise ConfigError(f"cannot download {what}: run pip install 'ngpt-campaign[hf]'") from None
    except Exception as error:  # the library, its HTTP client and its cache have no error in common
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"cannot download {what}: {printable(reason, MAX_REASON_LENGTH)}") from error
