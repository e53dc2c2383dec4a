"""The HTTP server: uvicorn with limits of its own, the socket, and what a signal does."""

import asyncio
import contextlib
import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ngpt.config.base import ConfigError
from ngpt.serve.answers import TokenTexts
from ngpt.serve.app import Service, make_app
from ngpt.serve.engine import Engine
from ngpt.serve.scheduler import Scheduler
from ngpt.system.cli import print_line
from ngpt.system.signals import call_on_signal

LARGEST_HEAD = 1 << 16  # bytes of a request line with its headers
HEAD_SECONDS = 20.0  # for a request line and its headers to arrive
SEND_SECONDS = 60.0  # for a client to read what is sent, until its connection is closed
IDLE_SECONDS = 75  # that a connection is kept for the next request
MOST_CONNECTIONS = 1024  # more are answered with 503
CHECK_SECONDS = 0.05  # between two looks at what still runs
CLOSING_SECONDS = 5  # for the last answers to leave, at the end


class Protocol(H11Protocol):
    """Uvicorn's HTTP/1.1, which also closes connections whose client sends no whole request, or reads no answer."""

    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer = _cancelled(self._head_timer)
        self._send_timer = _cancelled(self._send_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self._send_timer or self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._send_timer = _cancelled(self._send_timer)
        super().resume_writing()

    def _watch_head(self) -> None:
        """Starts the time of a request's head, or stops it once it is there."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def listen(ip: str, port: int) -> socket.socket:
    """Opens the socket on an IP address; port 0 is any free one.

    Raises:
        ConfigError: the address is not one of this machine, or the port is taken or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(ip, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(socket.socket(family, kind, protocol))
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart need not wait for old connections
            opened.bind(address)
            stack.pop_all()
        return opened
    except OSError as error:
        advice = (
            "; choose another --port, or 0 for a free one" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
        )
        raise ConfigError(f"--host {ip} --port {port}: {error.strerror}{advice}") from None


def url_of(opened: socket.socket) -> str:
    """The address of the server behind a socket, without a path."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves while the model is loaded, and until a signal: then what runs is finished, and new requests get 503.

    `grace` is how long that may take, in seconds. A second signal ends it at once.
    """

    def __init__(
        self,
        service: Service,
        token: str | None,
        *,
        load: Callable[[], Engine],
        queue: int,
        grace: float,
        announce: Callable[[], None],
    ) -> None:
        """`load` returns the model, in a thread; `announce` is called once the server listens."""
        self._service, self._load, self._queue, self._grace = service, load, queue, grace
        self._announce = announce
        self._error: BaseException | None = None
        self._signal: int | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.cut_off = 0  # choices that the end has interrupted
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a bad request is no error of the server
        options: dict[str, Any] = {"http": Protocol, "ws": "none", "loop": "asyncio", "lifespan": "off"}
        options |= {"log_config": None, "access_log": False, "server_header": False, "proxy_headers": False}
        options |= {"limit_concurrency": MOST_CONNECTIONS, "timeout_keep_alive": IDLE_SECONDS}
        options |= {"h11_max_incomplete_event_size": LARGEST_HEAD, "timeout_graceful_shutdown": CLOSING_SECONDS}
        super().__init__(uvicorn.Config(make_app(service, token), **options))

    def run_until_signal(self, opened: socket.socket) -> int | None:
        """Serves; returns the signal that has ended the server, if it interrupted work, else None.

        Raises what loading the model raises.
        """
        self.run([opened])
        if self._error is not None:
            raise self._error
        return self._signal if self.cut_off or self._service.engine is None else None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's handlers, whose first signal closes the socket at once."""
        with call_on_signal(self._on_signal, self._on_second_signal):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts listening, and to load the model in a thread: a signal need not wait for it."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._announce()
        threading.Thread(target=self._load_model, name="loading", daemon=True).start()

    async def main_loop(self) -> None:
        """Serves until a signal, then until nothing runs any more."""
        await super().main_loop()
        service, deadline = self._service, time.monotonic() + self._grace
        service.closing = True
        if (scheduler := service.scheduler) is None:
            return
        scheduler.close()
        if not scheduler.is_idle:
            print_line(f"finishing what runs, for at most {self._grace:g} s; another signal ends at once")
        while not scheduler.is_idle and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(CHECK_SECONDS)
        self.cut_off = await asyncio.to_thread(scheduler.stop)

    def _load_model(self) -> None:
        """Loads the model and opens the service, in a thread."""
        service = self._service
        try:
            engine = self._load()
            if service.template is not None:
                service.template.use(engine.tokenizer)
            scheduler = Scheduler(engine, queue=self._queue, metrics=service.metrics, deliver=self._call)
        except BaseException as error:  # is raised again where the server ends
            self._error, self.should_exit = error, True
            return
        service.texts, service.engine = TokenTexts(engine.tokenizer), engine
        service.created = int(engine.checkpoint.path.stat().st_mtime)
        service.scheduler = scheduler
        text = f"{engine.decoder.slots} choices at a time, context {engine.context:,} tokens, {engine.dtype}"
        print_line(f"ready: {text} on {engine.device.type}")

    def _call(self, function: Callable[[], None]) -> None:
        """Calls a function in the thread of the event loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function)

    def _on_signal(self, number: int) -> None:
        self._signal, self.should_exit, self._service.closing = number, True, True

    def _on_second_signal(self, number: int) -> None:
        self.force_exit = True


def ended_early(number: int | None) -> int:
    """The exit code of a server that a signal has ended: 0 if it interrupted nothing."""
    return 0 if number is None else 128 + number
