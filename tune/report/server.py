"""Serves pages of results over HTTP: to browsers of this user on this machine only, and without changing anything.

Whoever connects is not trusted: other users of the machine can reach the loopback address, and a page of another site
can let a browser ask for anything. So a request needs a name of this machine in its `Host` header (against DNS
rebinding), GET or HEAD, and a connection that no other user has opened. Their number and duration are bounded. The
pages come from a function (path) -> Page; what goes wrong in it is one line on stderr, and one sentence in the browser.
"""

import contextlib
import errno
import gzip
import hashlib
import io
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from ngpt.config.base import ConfigError
from ngpt.config.secrets import redact
from ngpt.system.cli import print_line
from ngpt.system.permissions import opened_by_another_user
from tune import format as fmt

ADDRESS = "127.0.0.1"
HOSTS = ("127.0.0.1", "localhost", "[::1]")  # with any port: `ssh -L` may forward another one
DEFAULT_PORT = 8484
PORTS_TO_TRY = 20  # after the default port
MAX_CONNECTIONS = 64
REQUEST_SECONDS = 20.0  # for a whole request to arrive; also how long an idle connection is kept
SEND_SECONDS = 60.0  # for a whole answer to leave
MAX_REQUEST = 1 << 16  # bytes of a request
MAX_REQUEST_LINE = 2048
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {  # of every answer
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Page:
    """An answer with its digest; `policy` is its Content-Security-Policy."""

    body: bytes
    kind: str = "text/html; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    policy: str = POLICY
    headers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def etag(self) -> str:
        """The digest of the body, as a weak validator: compressed or not, it is the same page."""
        return f'W/"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    @cached_property
    def compressed(self) -> bytes:
        """The body as gzip makes it."""
        return gzip.compress(self.body, compresslevel=5, mtime=0)


Site = Callable[[str], Page | None]  # the page of a path, without its query; None if there is none


def text_page(text: str, status: HTTPStatus, **headers: str) -> Page:
    """An answer of one line."""
    return Page(f"{text}\n".encode(), "text/plain; charset=utf-8", status, headers=headers)


def redirect(path: str) -> Page:
    """Sends the browser to another path of this server."""
    return text_page(f"see {path}", HTTPStatus.FOUND, Location=path)


class PageServer(ThreadingHTTPServer):
    """Listens on the loopback address and answers with the pages of a site; port 0 is any free one.

    Raises:
        OSError: the port is taken, or not allowed.
    """

    daemon_threads = True  # a slow client does not keep the command from ending
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__((ADDRESS, port), _Handler)

    @property
    def url(self) -> str:
        """The address of the first page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def server_bind(self) -> None:
        """Binds without the look-up of the host's name in `HTTPServer`, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = ADDRESS, self.socket.getsockname()[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answers in a thread of its own; refuses if too many connections are open."""
        if not self._slots.acquire(blocking=False):
            request.setblocking(False)
            with contextlib.suppress(OSError):  # the client has gone
                request.send(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers the requests of one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in one line what has ended a connection, unless it is only that the client has gone."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print_line(f"a connection ended: {describe(error)}")


def open_server(site: Site, port: int | None) -> PageServer:
    """A server on `port`; on None, the default port or the first free one after it, which is said on stderr.

    Raises:
        ConfigError: the port is taken, or this user may not listen on it.
    """
    if port is not None:
        try:
            return PageServer(site, port)
        except OSError as error:
            text = f"--port {port}: {error.strerror}; choose another one, or leave --port out"
            raise ConfigError(text) from None
    last = DEFAULT_PORT + PORTS_TO_TRY
    for candidate in range(DEFAULT_PORT, last + 1):
        try:
            server = PageServer(site, candidate)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            if candidate != DEFAULT_PORT:
                print_line(f"port {DEFAULT_PORT} is in use, so this is port {candidate}")
            return server
    raise ConfigError(f"ports {DEFAULT_PORT} to {last} are in use; choose another one with --port")


def open_in_browser(url: str) -> threading.Thread:
    """Opens a page in the user's browser, in a thread that it returns; says so on stderr if there is none."""

    def start() -> None:
        if not webbrowser.open(url):
            print_line("no browser could be started; open the address above")

    thread = threading.Thread(target=start, daemon=True, name="browser")
    thread.start()
    return thread


def describe(error: BaseException | None) -> str:
    """An exception on one line, without secrets."""
    return fmt.shorten(fmt.plain(redact(f"{type(error).__name__}: {error}")), fmt.MAX_REASON)


class _Deadline(io.RawIOBase):
    """Reads from a socket until a deadline, so that a client cannot send its request byte by byte for ever."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.renew()

    def renew(self) -> None:
        """Starts the time, and the bytes, that the next request may take."""
        self._end, self._left = time.monotonic() + REQUEST_SECONDS, MAX_REQUEST

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what has come; TimeoutError after the deadline, or if the request is too long."""
        seconds = self._end - time.monotonic()
        if seconds <= 0 or self._left <= 0:
            raise TimeoutError("the request is too slow or too long")
        self._connection.settimeout(seconds)
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count


class _Handler(BaseHTTPRequestHandler):
    """Answers the requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        """Reads the connection through a deadline, and notes whether another user has opened it."""
        super().setup()
        self._deadline = _Deadline(self.connection)
        self.rfile = io.BufferedReader(self._deadline)
        assert isinstance(self.server, PageServer)
        self._site = self.server.site
        self._is_stranger = opened_by_another_user(self.client_address, (ADDRESS, self.server.server_port))

    def handle_one_request(self) -> None:
        """Reads one request and answers it; a client that is too slow is hung up on."""
        self.close_connection, self.command = True, ""
        self._deadline.renew()
        try:
            self.raw_requestline = self.rfile.readline(MAX_REQUEST_LINE + 1)
            if len(self.raw_requestline) > MAX_REQUEST_LINE:
                self.requestline = ""
                self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            elif self.raw_requestline and self.parse_request():
                self._send(self._answer(), close=self._has_body())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _has_body(self) -> bool:
        """Whether something follows the request that is not read, so that the connection cannot be used again."""
        return "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"

    def _answer(self) -> Page:
        if self._is_stranger:
            return text_page("these results are for the user who serves them", HTTPStatus.FORBIDDEN)
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or _without_port(hosts[0]) not in HOSTS:
            return text_page(f"the Host must be one of {', '.join(HOSTS)}", HTTPStatus.FORBIDDEN)
        if self.command not in ("GET", "HEAD"):
            return text_page("this server only shows results", HTTPStatus.METHOD_NOT_ALLOWED, Allow="GET, HEAD")
        if self._has_body():
            return text_page("a request has no body", HTTPStatus.BAD_REQUEST)
        path = self.path.partition("?")[0]
        try:
            page = self._site(path)
        except Exception as error:  # of any kind: the server goes on, and its terminal says what it was
            print_line(f"{self.command} {fmt.shorten(fmt.plain(path), 100)}: internal error: {describe(error)}")
            return text_page("internal error; the terminal of the server says more", HTTPStatus.INTERNAL_SERVER_ERROR)
        return text_page("there is no such page", HTTPStatus.NOT_FOUND) if page is None else page

    def _send(self, page: Page, *, close: bool = False) -> None:
        is_known = page.status is HTTPStatus.OK and page.etag in self.headers.get("If-None-Match", "")
        body = b"" if is_known else page.body
        self.connection.settimeout(SEND_SECONDS)
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else page.status)
        headers = HEADERS | {"Content-Security-Policy": page.policy} | page.headers
        if page.status is HTTPStatus.OK:
            headers |= {"ETag": page.etag, "Vary": "Accept-Encoding"}
        if len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            headers["Content-Encoding"], body = "gzip", page.compressed
        if not is_known:
            headers |= {"Content-Type": page.kind, "Content-Length": str(len(body))}
        if close:
            headers["Connection"] = "close"  # `send_header` remembers it
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses what `parse_request` cannot read; repeats nothing of it."""
        self.headers = getattr(self, "headers", None) or self.MessageClass()
        self.request_version = self.protocol_version  # an answer without headers would be none
        self._send(text_page(HTTPStatus(code).phrase, HTTPStatus(code)), close=True)

    def version_string(self) -> str:
        """The `Server` header, without the versions of what runs here."""
        return "ngpt-campaign"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps no log of requests."""


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()
