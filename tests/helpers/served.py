"""A server of a tiny model as its own process, and what it says about itself."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from tests.helpers import ROOT

TEMPLATE = """\
{%- if messages[0].role != "user" %}{{ raise_exception("a user speaks first") }}{% endif %}
{%- for message in messages %}
{{ message.role }}: {{ message.content }}
{% endfor %}
assistant:"""


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen[str]
    url: str  # with /v1
    errors: Path  # its stderr

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, which does not try again unless it is told to."""
        return openai.OpenAI(**{"base_url": self.url, "api_key": "none", "max_retries": 0, "timeout": 120.0} | options)

    def post(self, path: str, **request: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=120.0, **request)

    def metric(self, name: str) -> float:
        """The value of a metric without labels, or with those in its name."""
        text = httpx.get(f"{self.root}/metrics", timeout=60.0).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in {text}"
        return float(found[1])

    def until(self, holds: Callable[[], bool]) -> None:
        """Waits until a condition holds; fails if the server ends first."""
        for _ in range(1200):
            if holds():
                return
            assert self.process.poll() is None, f"the server ended first: {self.errors.read_text()}"
            time.sleep(0.05)
        raise AssertionError("it never happened")

    def is_ready(self) -> bool:
        return httpx.get(f"{self.root}/health", timeout=60.0).status_code == 200


@contextlib.contextmanager
def served(run: Path, folder: Path, *options: str, port: int = 0) -> Iterator[Served]:
    """Serves a run until the context closes, which kills the process if it still lives."""
    command = [sys.executable, "-m", "ngpt.serve", str(run), "--port", str(port), "--device", "cpu", "--json", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    errors = folder / "errors.txt"
    with (
        errors.open("w") as file,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, stdin=subprocess.DEVNULL, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, errors.read_text()
            server = Served(process, json.loads(line)["url"], errors)
            server.until(server.is_ready)
            yield server
        finally:
            process.kill()
