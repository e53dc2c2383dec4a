"""A Hugging Face hub of our own on this machine, with every fault that a real one has on a bad day."""

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[["Handler", bytes], None]  # answers a request for these bytes in another way than it should


class Hub:
    """Serves `files` (path to bytes) as one data set; `faults` of a path are used up, one a request."""

    def __init__(self, dataset: str, *, revision: str = "main", page: int = 1000) -> None:
        self.dataset, self.revision, self.page = dataset, revision, page
        self.files: dict[str, bytes] = {}
        self.published: dict[str, str] = {}  # SHA-256 by path, where it is not the one of the bytes
        self.faults: dict[str, list[Fault]] = {}
        self.ranges = True  # whether Range is understood
        self.requests: list[tuple[str, str | None]] = []  # path and Range of each request for a file
        self.listed = 0
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        hub, url = self.hub, urllib.parse.urlsplit(self.path)
        tree = f"/api/datasets/{hub.dataset}/tree/{urllib.parse.quote(hub.revision, safe='')}"
        files = f"/datasets/{hub.dataset}/resolve/{urllib.parse.quote(hub.revision, safe='')}/"
        if url.path == tree:
            self._list(urllib.parse.parse_qs(url.query))
        elif url.path.startswith(files):  # as the real one does: somewhere else lies the content
            self._answer(302, b"", Location=f"{hub.url}/cdn/{url.path.removeprefix(files)}")
        elif url.path.startswith("/cdn/"):
            self._send(urllib.parse.unquote(url.path.removeprefix("/cdn/")))
        else:
            self._answer(404, b"no such page")

    def _list(self, query: dict[str, list[str]]) -> None:
        hub = self.hub
        hub.listed += 1
        entries: list[dict[str, Any]] = [{"type": "file", "path": ".gitattributes", "size": 5, "oid": "5" * 40}]
        entries.append({"type": "directory", "path": "plain_text", "size": 0, "oid": "6" * 40})
        for path, data in hub.files.items():
            digest = hub.published.get(path, hashlib.sha256(data).hexdigest())
            lfs = {"oid": digest, "size": len(data), "pointerSize": 134}
            entries.append({"type": "file", "path": path, "size": len(data), "oid": "7" * 40, "lfs": lfs})
        first = int(query.get("cursor", ["0"])[0])
        rest = len(entries) > first + hub.page
        link = {"Link": f'<{self.path.split("&")[0]}&cursor={first + hub.page}>; rel="next"'} if rest else {}
        self._answer(200, json.dumps(entries[first : first + hub.page]).encode(), **link)

    def _send(self, path: str) -> None:
        hub, wanted = self.hub, self.headers.get("Range")
        hub.requests.append((path, wanted))
        if path not in hub.files:
            self._answer(404, b"Entry not found")
            return
        data = hub.files[path]
        if hub.faults.get(path):
            hub.faults[path].pop(0)(self, data)
            return
        self.send(data)

    def send(self, data: bytes, *, stop_after: int | None = None) -> None:
        """The bytes that were asked for, or the first `stop_after` of these and then a closed connection."""
        wanted, size = self.headers.get("Range"), len(data)
        status, extra = 200, {}
        if wanted and self.hub.ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= size:
                self._answer(416, b"", **{"Content-Range": f"bytes */{size}"})
                return
            status, extra = 206, {"Content-Range": f"bytes {first}-{size - 1}/{size}"}
            data = data[first:]
        self._answer(status, data[:stop_after], length=len(data), **extra)

    def _answer(self, status: int, data: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def fail(self, status: int) -> None:
        self._answer(status, b"")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


def cut_after(n_bytes: int) -> Fault:
    """The connection closes after so many bytes of what was to come."""
    return lambda handler, data: handler.send(data, stop_after=n_bytes)


def status(code: int) -> Fault:
    return lambda handler, data: handler.fail(code)
