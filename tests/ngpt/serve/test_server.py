"""The server inside of this process: states, tokens, time limits and failures, each brought about on purpose."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import Dataset
from ngpt.serve import __main__ as serve_command
from ngpt.serve import access
from ngpt.serve import app as http_app
from ngpt.serve import server as http_server
from ngpt.serve.app import Service
from ngpt.serve.engine import Engine
from ngpt.serve.metrics import Metrics
from ngpt.serve.server import Server, listen, url_of
from ngpt.serve.work import Limits
from ngpt.training.config import TrainConfig
from tests.helpers.tiny_run import run

TOKEN = "correct-horse-battery-staple"
REQUEST = {"model": "first", "prompt": "A", "max_tokens": 3}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
LONG = 4000  # tokens
ATTEMPTS = 6000  # of 0.01 s, until something that has to happen has not happened


def until(holds: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    for _ in range(ATTEMPTS):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


@dataclass
class Running:
    """A server in a thread, and a client of it."""

    server: Server
    thread: threading.Thread
    client: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        return self.client.base_url.host, self.client.base_url.port or 0

    def health(self) -> tuple[int, str]:
        answer = self.client.get("/health")
        return answer.status_code, answer.json()["status"]

    def complete(self, *, ready: bool = True, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
        """Asks for a completion, by default once the model is loaded."""
        if ready:
            until(lambda: self.health()[1] != "loading")
        return self.client.post("/v1/completions", json=REQUEST | changes, headers=headers)

    def metrics(self) -> str:
        return self.client.get("/metrics").text


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def run_folder(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "first"
    run(override(tiny, {"steps": 1}), folder, dataset)
    return folder


@pytest.fixture
def start(run_folder: Path) -> Iterator[Start]:
    """Starts a server in a thread; `load` changes how it gets its model."""
    running: list[Running] = []

    def begin(
        *, token: str | None = None, load: Callable[[Engine], Engine] = lambda engine: engine, **limits: Any
    ) -> Running:
        def engine() -> Engine:
            return load(Engine(run_folder, name="first", slots=2, device="cpu", changes={"model.block_size": LONG + 9}))

        service, listening = Service("first", Limits(**limits), Metrics()), threading.Event()
        opened = listen("127.0.0.1", 0)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections
        client = httpx.Client(base_url=url_of(opened), timeout=60, verify=False)
        new = Server(service, token, load=engine, queue=0, grace=0.1, announce=listening.set)
        thread = threading.Thread(target=new.run_until_signal, args=(opened,))
        thread.start()
        running.append(Running(new, thread, client))
        assert listening.wait(60)
        return running[-1]

    yield begin
    for each in running:
        each.client.close()
        each.server.should_exit = True
        each.thread.join(60)
        assert not each.thread.is_alive()


def test_a_server_that_loads_its_model_says_so(start: Start) -> None:
    may_load = threading.Event()

    def wait(engine: Engine) -> Engine:
        assert may_load.wait(60)
        return engine

    server = start(load=wait)
    assert server.health() == (503, "loading")
    refused = server.complete(ready=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
    assert int(refused.headers["retry-after"]) > 0
    may_load.set()
    assert server.complete().status_code == 200


def test_a_request_needs_the_token_and_health_does_not(start: Start) -> None:
    server = start(token=TOKEN)
    for header in ("", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer é"):
        refused = server.client.get("/v1/models", headers={b"Authorization": header.encode()})
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), header
    assert {server.client.get(path).status_code for path in ("/v1/models", "/metrics", "/v1/nothing", "/")} == {401}
    until(lambda: server.health() == (200, "ok"))
    authorized = {"Authorization": f"Bearer {TOKEN}", "Host": "models.example.org"}
    assert server.complete(headers=authorized).status_code == 200
    metrics = server.client.get("/metrics", headers=authorized).text
    assert 'ngpt_http_responses_total{path="/v1/completions",status="200"} 1.0' in metrics


def test_without_a_token_a_request_names_this_machine_and_is_of_this_user(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = start().client
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        assert client.get("/health", headers={"Host": host}).status_code == 403, host
    assert client.get("/v1/models", headers={"Host": "localhost"}).status_code == 200
    seen: list[Any] = []
    monkeypatch.setattr(access, "opened_by_another_user", lambda *ends: bool(seen.append(ends)) or True)
    assert client.get("/v1/models").status_code == 403
    assert seen[0][1] == (client.base_url.host, client.base_url.port)


def test_another_host_is_refused_without_a_token(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "token"
    short.write_text("hunter2")
    for arguments, words in (
        (["--host", "0.0.0.0"], "needs a token"),
        (["--host", "::"], "needs a token"),
        (["--host", "::1"], "needs a token"),
        (["--host", "bad..host"], "--host bad..host: "),
        (["--host", "0.0.0.0", "--token-file", str(short)], "at least 16"),
        (["--token-file", str(tmp_path / "nothing")], "no such file"),
    ):
        assert serve_command.main([str(run_folder), "--port", "0", *arguments]) == 2
        errors = capsys.readouterr().err
        assert words in errors and errors.count("\n") == 1 and "hunter2" not in errors
    monkeypatch.setenv(access.TOKEN_VARIABLE, TOKEN)
    access.check_address("0.0.0.0", access.read_token(None))
    assert access.address_of("localhost") == "127.0.0.1"


def test_results_without_a_model_are_refused_before_the_server_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "summary.json").write_text('{"phases": []}')
    for path, words in ((tmp_path, "has no finished phase yet"), (tmp_path / "nothing", "no such folder")):
        assert serve_command.main([str(path), "--port", "0"]) == 2
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""


def test_a_missing_package_is_one_line_with_the_extra(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_command, "find_spec", lambda name: None if name == "starlette" else name)
    assert serve_command.main([str(run_folder)]) == 2
    assert capsys.readouterr().err == "ngpt.serve needs starlette: pip install 'ngpt-campaign[serve]'\n"


def test_a_port_that_is_taken_is_refused_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=re.escape(f"--port {port}: Address already in use; choose another")):
            listen("127.0.0.1", port)


def test_an_answer_that_takes_too_long_ends(start: Start) -> None:
    server = start(seconds=0.2)
    refused = server.complete(max_tokens=LONG)
    assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
    last = server.complete(max_tokens=LONG, stream=True).text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    until(lambda: 'ngpt_choices_total{reason="cancelled"} 2.0' in server.metrics())
    assert "ngpt_choices_running 0.0" in server.metrics()


def test_a_client_that_sends_no_whole_request_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.2)
    monkeypatch.setattr(http_app, "ARRIVAL_SECONDS", 0.2)
    server = start()
    assert server.complete().status_code == 200
    address = server.address
    for beginning in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(beginning)
            assert slow.recv(1) == b""
    with socket.create_connection(address, timeout=60) as slow:
        slow.sendall(f"{HEAD}1000\r\n\r\n{{".encode())
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(address, timeout=60) as flood:
        flood.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (1 << 17))
        assert flood.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_reads_nothing_is_cut_off(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "SEND_SECONDS", 0.2)
    running = start()
    assert running.complete().status_code == 200
    running.client.close()
    open_connections = running.server.server_state.connections
    until(lambda: not open_connections)
    body = json.dumps(REQUEST | {"max_tokens": LONG, "stream": True, "logprobs": 5}).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(running.address)
        deaf.sendall(f"{HEAD}{len(body)}\r\n\r\n".encode() + body)
        until(lambda: bool(open_connections))
        until(lambda: not open_connections)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := deaf.recv(1 << 16):
                received += part
    assert received.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" not in received


def test_a_step_that_fails_fails_its_requests_and_then_the_health(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    failures = [RuntimeError("the device is on fire")] * 3

    def breaks(engine: Engine) -> Engine:
        works = engine.decoder.step

        def step() -> Any:
            if failures:
                raise failures.pop()
            return works()

        engine.decoder.step = step
        return engine

    server = start(load=breaks)
    for status in ("ok", "ok", "failing"):
        answer = server.complete()
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "fire" not in answer.text
        assert server.health()[1] == status
    assert "the device is on fire" in capfd.readouterr().err
    assert server.complete().status_code == 200
    assert server.health() == (200, "ok")
