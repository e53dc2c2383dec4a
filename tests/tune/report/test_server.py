"""The server: who is answered, what is refused, and that no client can make it hang, fail or say too much."""

import gzip
import http.client
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.other_user import as_other_user
from tune.report import server
from tune.report.server import ADDRESS, Page, PageServer, Site, open_server

BODY = b"<p>" + b"a page " * 400
SECRET = "hunter2-hunter2"


def site(path: str) -> Page | None:
    if path == "/broken":
        raise KeyError(f"\x1b[2J {os.environ['SOME_TOKEN']}")
    return Page(BODY) if path == "/" else None


@contextmanager
def serving(pages: Site = site) -> Iterator[PageServer]:
    with PageServer(pages, 0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    with serving() as made:
        yield made.server_port


def ask(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(ADDRESS, port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def say(port: int, request: bytes) -> bytes:
    """Sends bytes and returns everything until the server closes the connection."""
    with socket.create_connection((ADDRESS, port), timeout=60) as client:
        client.sendall(request)
        answer = b""
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:  # it has not read all that was sent
            pass
        return answer


def test_it_listens_on_the_loopback_address_only() -> None:
    with PageServer(site, 0) as made:
        assert made.socket.getsockname() == ("127.0.0.1", made.server_port)
        assert made.url == f"http://127.0.0.1:{made.server_port}/"


def test_get_and_head_are_answered_and_every_other_method_is_refused(port: int) -> None:
    answer, body = ask(port)
    assert (answer.status, body) == (200, BODY)
    headers = {name: value for name, value in answer.getheaders() if name != "Date"}
    assert headers["Content-Type"] == "text/html; charset=utf-8" and headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in headers["Content-Security-Policy"] and "Python" not in str(headers)
    answer, body = ask(port, method="HEAD")
    assert (answer.status, body) == (200, b"")
    assert {name: value for name, value in answer.getheaders() if name != "Date"} == headers
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "BREW"):
        answer, body = ask(port, method=method)
        assert (answer.status, answer.getheader("Allow")) == (405, "GET, HEAD"), method
    assert ask(port, "/other")[0].status == 404


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9999", 200),  # through `ssh -L 9999:localhost:8484`
        ("[::1]:80", 200),
        ("LOCALHOST", 200),
        ("evil.example", 403),
        ("evil.example:8484", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost:80:80", 403),
        ("localhost:", 403),
        ("", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(port: int, host: str, status: int) -> None:
    """A page of another site whose name leads here (DNS rebinding) sends its own name."""
    assert ask(port, Host=host)[0].status == status


def test_a_request_without_a_host_or_with_two_is_refused(port: int) -> None:
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        answer = say(port, b"GET / HTTP/1.1\r\n" + hosts + b"Connection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 403 ") and BODY not in answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 18\r\n\r\nGET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"431"),
        (b"<script>alert(1)</script>\r\n\r\n", b"400"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", b"505"),
    ],
)
def test_a_strange_request_gets_one_sentence_that_repeats_nothing_of_it(
    port: int, request_: bytes, status: bytes
) -> None:
    answer = say(port, request_)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == status and answer.count(b"HTTP/1.1 ") == 1
    assert len(body) < 60 and b"script" not in answer and b"aaaa" not in answer


def test_a_page_that_is_known_is_not_sent_again_and_a_large_one_is_compressed(port: int) -> None:
    answer, _ = ask(port)
    tag = answer.getheader("ETag")
    assert tag
    again, body = ask(port, **{"If-None-Match": tag})
    assert (again.status, body, again.getheader("ETag")) == (304, b"", tag)
    assert ask(port, **{"If-None-Match": 'W/"another"'})[1] == BODY
    packed, body = ask(port, **{"Accept-Encoding": "gzip, br"})
    assert packed.getheader("Content-Encoding") == "gzip" and packed.getheader("ETag") == tag
    assert gzip.decompress(body) == BODY and len(body) < len(BODY)


def test_an_error_is_one_line_on_stderr_and_one_sentence_for_the_browser(
    port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_TOKEN", SECRET)
    answer, body = ask(port, "/broken")
    assert answer.status == 500
    assert body == b"internal error; the terminal of the server says more\n"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("GET /broken: internal error: KeyError") and "\x1b" not in line and SECRET not in line


def test_a_slow_client_is_dropped_and_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "REQUEST_SECONDS", 1.0)
    with serving() as made, socket.create_connection((ADDRESS, made.server_port), timeout=60) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: local")
        assert ask(made.server_port)[0].status == 200
        assert slow.recv(1000) == b""  # closed, however long the client would have gone on


def test_too_many_connections_are_refused_until_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 2)
    with serving() as made:
        idle = [socket.create_connection((ADDRESS, made.server_port), timeout=60) for _ in range(2)]
        try:
            assert say(made.server_port, b"").startswith(b"HTTP/1.1 503 ")
        finally:
            for each in idle:
                each.close()
        statuses: list[int] = []
        while 200 not in statuses:  # the server notices the ends when it reads
            try:
                statuses.append(ask(made.server_port)[0].status)
            except (ConnectionError, http.client.HTTPException):
                statuses.append(503)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_is_refused() -> None:
    with PageServer(site, 0) as made:
        with as_other_user():  # the connection waits until the server takes it
            client = socket.create_connection((ADDRESS, made.server_port), timeout=60)
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        try:
            with client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 403 ") and BODY not in answer
            assert ask(made.server_port)[0].status == 200
        finally:
            made.shutdown()
            thread.join()


def test_the_next_free_port_is_taken_and_said_unless_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with PageServer(site, 0) as other:
        taken = other.server_port
        monkeypatch.setattr(server, "DEFAULT_PORT", taken)
        with open_server(site, None) as made:
            assert taken < made.server_port <= taken + server.PORTS_TO_TRY
            assert capsys.readouterr().err == f"port {taken} is in use, so this is port {made.server_port}\n"
        with pytest.raises(ConfigError, match=f"--port {taken}: Address already in use; choose another one"):
            open_server(site, taken)


def test_a_browser_that_cannot_be_started_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    start: Callable[[str], bool] = lambda url: bool(opened.append(url))  # noqa: E731
    monkeypatch.setattr("webbrowser.open", start)
    server.open_in_browser("http://127.0.0.1:1/").join(60)
    assert opened == ["http://127.0.0.1:1/"]
    assert capsys.readouterr().err == "no browser could be started; open the address above\n"
