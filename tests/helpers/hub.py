"""A stand-in for the Hugging Face hub on the loopback, with the faults of a real one."""

import hashlib
import json
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.helpers.loopback import LoopbackServer

Fault = Callable[["Handler", bytes], None]  # answers one request for a file, whose bytes it gets


class Hub(LoopbackServer):
    """Serves `files` (path to bytes) as one data set. Each request for a path uses up one of its `faults`."""

    def __init__(self, dataset: str, *, revision: str = "main") -> None:
        self.dataset, self.revision = dataset, revision
        self.files: dict[str, bytes] = {}
        self.published: dict[str, str] = {}  # SHA-256 by path, where it is not the hash of the bytes
        self.faults: dict[str, list[Fault]] = {}
        self.small: set[str] = set()  # paths of files that git keeps itself, without a SHA-256
        self.card: dict[str, Any] = {}  # metadata of the README
        self.commit = "8" * 40
        self.ranges = True  # whether the Range header is respected
        self.requests: list[tuple[str, int]] = []  # path and first byte of each request for a file
        self.tokens: set[str | None] = set()  # what requests for a file had as authorization
        self.listed = 0
        super().__init__(Handler)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, path = self.hub, urllib.parse.urlsplit(self.path).path
        revisions = (urllib.parse.quote(hub.revision, safe=""), hub.commit)
        files = [prefix for each in revisions if path.startswith(prefix := f"/datasets/{hub.dataset}/resolve/{each}/")]
        if path in [f"/api/datasets/{hub.dataset}/revision/{revision}" for revision in revisions]:
            self._list()
        elif files:  # the real hub redirects to its CDN as well
            self._answer(302, b"", Location=f"{hub.url}/cdn/{path.removeprefix(files[0])}")
        elif path.startswith("/cdn/"):
            self._send_file(urllib.parse.unquote(path.removeprefix("/cdn/")))
        else:
            self.fail(404)

    def do_HEAD(self) -> None:
        data = self.hub.files.get(self.path.removeprefix("/cdn/"))
        self.hub.tokens.add(self.headers["Authorization"])
        self._answer(404 if data is None else 200, b"", length=len(data or b""))

    def _list(self) -> None:
        """The fields of the real answer that the client reads."""
        hub = self.hub
        hub.listed += 1
        siblings: list[dict[str, Any]] = [{"rfilename": ".gitattributes", "size": 5, "blobId": "5" * 40}]
        for path, data in hub.files.items():
            digest = hub.published.get(path, hashlib.sha256(data).hexdigest())
            lfs = {"sha256": digest, "size": len(data), "pointerSize": 134}
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling = {"rfilename": path, "size": len(data), "blobId": hub.published.get(path, blob)}
            siblings.append(sibling if path in hub.small else sibling | {"lfs": lfs})
        info = {"id": hub.dataset, "sha": hub.commit, "private": False, "downloads": 0, "likes": 0, "tags": []}
        self._answer(200, json.dumps(info | {"siblings": siblings, "cardData": hub.card}).encode())

    def _send_file(self, path: str) -> None:
        hub = self.hub
        hub.requests.append((path, self._range()[0]))
        hub.tokens.add(self.headers["Authorization"])
        if path not in hub.files:
            self.fail(404)
        elif hub.faults.get(path):
            hub.faults[path].pop(0)(self, hub.files[path])
        else:
            self.send(hub.files[path])

    def _range(self) -> tuple[int, int]:
        """The first and the last byte of the Range header."""
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        return int(first), int(last)

    def send(self, data: bytes, *, stop_after: int | None = None) -> None:
        """Sends the requested bytes, or the first `stop_after` of them before the connection closes."""
        status, headers = 200, {}
        if self.hub.ranges:
            first, last = self._range()
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self._answer(status, data[:stop_after], length=len(data), **headers)

    def _answer(self, status: int, data: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int) -> None:
        """Answers with an error."""
        self._answer(status, b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps stderr empty."""


def cut_after(n_bytes: int) -> Fault:
    """Closes the connection after `n_bytes` of the answer."""
    return lambda handler, data: handler.send(data, stop_after=n_bytes)


def status(code: int) -> Fault:
    """Answers with an HTTP error."""
    return lambda handler, data: handler.fail(code)
