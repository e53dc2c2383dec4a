"""The session as seen by the process that runs Ray (tune/executors/ray_process.py)."""

import threading
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from typing import Any


class RemoteSession:
    """Forwards method calls to the `Session` in the parent process."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()  # two threads call methods
        self.stop_requested = False  # as of the latest reply

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):  # looked up by Python itself, for example to pickle
            raise AttributeError(method)
        return partial(self._call, method)

    def _call(self, *message: Any) -> Any:
        with self._lock:
            self._connection.send(message)
            value, self.stop_requested = self._connection.recv()
        return value
