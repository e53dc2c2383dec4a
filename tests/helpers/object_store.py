"""An S3 server on this machine (moto), and a line to it that a test can cut."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow.fs

PATIENCE = 60.0  # seconds for the server to start
SECRET = "a-secret-key-of-the-tests"


def environment(port: int, host: str = "127.0.0.1") -> dict[str, str]:
    """The variables with which any S3 client talks to the server at this address."""
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}


@contextmanager
def s3_server(folder: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """Runs an S3 server that listens at `host`, with its log in `folder`; yields its port."""
    log = folder / "moto.log"
    script = "import sys; from moto.server import main; main(sys.argv[1:])"
    with log.open("wb") as out:
        server = subprocess.Popen([sys.executable, "-c", script, "-H", host, "-p", "0"], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(r"Running on http://[\d.]+:(\d+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield int(found[1])
    finally:
        server.kill()
        server.wait()


def make_bucket(name: str) -> pyarrow.fs.FileSystem:
    """Makes a bucket on the server that the environment names; returns its file system."""
    files, _ = pyarrow.fs.FileSystem.from_uri(f"s3://{name}?allow_bucket_creation=true")
    files.create_dir(name)
    return files


class Line:
    """Passes connections at `port` of `host` on to a server on the loopback; while it is cut, they are refused."""

    def __init__(self, server: int, host: str = "127.0.0.1") -> None:
        self._server, self._host = server, host
        with socket.socket() as chosen:
            chosen.bind((host, 0))
            self.port = chosen.getsockname()[1]
        self._open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        """Accepts connections again."""
        self._listener = socket.create_server((self._host, self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Ends all connections and refuses new ones."""
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = listener.accept()
                there = socket.create_connection(("127.0.0.1", self._server))
                self._open += [here, there]
                if listener.fileno() < 0:  # cut meanwhile
                    self.cut()
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(1 << 16):
                target.sendall(block)
        for each in (source, target):  # both, so that the other direction ends, too
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
