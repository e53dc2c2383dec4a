"""What is said of a Ray cluster that cannot be joined; tests/test_cluster_start.py joins real ones."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tune.cluster.connection import join_cluster, quiet_stderr


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_port_on_which_something_else_listens_is_an_error() -> None:
    """In a process of its own, since Ray's C++ code goes on to write warnings after the time limit."""
    with socket.create_server(("0.0.0.0", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        code = f"from tune.cluster import connection; connection.GCS_SECONDS = 0.5; connection.join_cluster('{place}')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.splitlines()[-1]
    assert re.search(f"ConfigError: --address {place}.*: the port is open, but no Ray answers there", last)
    assert "rpc_client" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"RAY_AUTH_MODE": "token"}, "RAY_AUTH_MODE is token, and there is no token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "RAY_AUTH_TOKEN_PATH=/nowhere/token is not a file with a token"),
    ],
)
def test_a_missing_token_is_named_before_ray_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], reason: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        join_cluster("127.0.0.1:6379")
    assert reason in str(raised.value) and "auth_token" in str(raised.value) and "\n" not in str(raised.value)


def test_what_other_code_writes_to_stderr_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"rpc_client.h:153: Failed to connect\n")
    os.write(2, b"shown\n")
    assert capfd.readouterr().err == "shown\n"
