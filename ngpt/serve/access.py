"""Who may ask: a bearer token, or without one the user who started the server, on this machine."""

import hashlib
import hmac
import ipaddress
import os
import re
import socket
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ngpt.config.base import ConfigError
from ngpt.serve.delivery import error_response
from ngpt.serve.metrics import Metrics
from ngpt.serve.schema import ApiError
from ngpt.system.permissions import opened_by_another_user

TOKEN_VARIABLE = "NGPT_SERVE_TOKEN"
SHORTEST_TOKEN = 16  # characters
LARGEST_TOKEN_FILE = 4096  # bytes
OPEN_PATHS = ("/health",)  # without a token: for what restarts or balances servers
PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")  # counted by name


def read_token(path: Path | None) -> str | None:
    """The token of a file, else of the environment; None if there is neither.

    Raises:
        ConfigError: the file cannot be read, or the token is short or has other characters than visible ASCII.
    """
    source, token = f"${TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
    if path is not None:
        source = f"--token-file {path}"
        try:
            with path.open("rb") as file:
                token = file.read(LARGEST_TOKEN_FILE).decode(errors="replace").strip()
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"{source}: no such file") from None
    if token is None:
        return None
    if not re.fullmatch(rf"[!-~]{{{SHORTEST_TOKEN},}}", token):
        advice = 'make one: python -c "import secrets; print(secrets.token_urlsafe(32))"'
        raise ConfigError(f"{source}: a token has at least {SHORTEST_TOKEN} visible ASCII characters; {advice}")
    return token


def address_of(host: str) -> str:
    """The address of a host name on this machine, IPv4 if it has one. ConfigError if it has none."""
    try:
        found = socket.getaddrinfo(host or None, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host}: {getattr(error, 'strerror', None) or error}") from None
    return str(min(found, key=lambda entry: entry[0] != socket.AF_INET)[4][0])


def check_address(address: str, token: str | None) -> None:
    """Raises ConfigError if others than the user who starts the server could ask without a token.

    Of a connection over IPv4, Linux tells which user has opened it.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if token is None and not (ip.version == 4 and ip.is_loopback):
        raise ConfigError(
            f"--host: {address} can be reached by others than you, which needs a token: "
            f"give --token-file FILE or set {TOKEN_VARIABLE}; without one, listen on 127.0.0.1"
        )


class Guard:
    """Passes requests on to `app` if they come from somebody who may ask, and counts all answers.

    With a token, a request needs it. Without one, the server listens on the loopback address, and a request must name
    this machine in its `Host` header (against DNS rebinding) and come from a user who could read the server's memory
    anyway: its own or root.
    """

    def __init__(self, app: ASGIApp, token: str | None, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics
        self._digest = None if token is None else _digest(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["path"] in PATHS else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._digest is not None:
            if scope["path"] not in OPEN_PATHS:
                self._check_token(headers)
            return
        names = headers.getlist("host")
        if len(names) != 1 or not re.fullmatch(r"(?i)(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", names[0]):
            raise ApiError(403, "without a token, only this machine may ask, by the name localhost or 127.0.0.1")
        client, server = scope.get("client"), scope.get("server")
        if client and server and "." in client[0] and opened_by_another_user(tuple(client), tuple(server)):
            message = "without a token, only the user who has started the server may ask: start it with a token"
            raise ApiError(403, message)

    def _check_token(self, headers: Headers) -> None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            message = "a token is needed: Authorization: Bearer TOKEN (the api_key of OpenAI's client)"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        # Digests have one length, so the time of the comparison says nothing about the token.
        if self._digest is None or not hmac.compare_digest(_digest(given.strip()), self._digest):
            message = "the token is wrong"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
