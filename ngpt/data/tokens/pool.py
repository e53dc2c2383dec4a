"""Encodes many texts in several processes, in order: the tokens are the same whatever the number of processes.

The processes are plain `python -c` children that speak pickle over their pipes, not multiprocessing's: those import
the caller's main script again, cannot be started by daemonic processes, and outlive a parent that is killed.
"""

import multiprocessing
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer

BATCH = 1 << 20  # characters that go to a process at once
PARALLEL_ABOVE = 20_000_000  # bytes of text; below that starting processes costs more than it saves

Text = tuple[str, str]  # split, text
Encoded = tuple[str, np.ndarray, bool]  # split, ids (N,) uint16, whether their bytes are those of the text


@dataclass(frozen=True)
class Encoding:
    """What a child needs to encode as its parent would: the tokenizer, and whether each text starts with its mark."""

    spec: str
    folder: Path
    marked: bool


def default_workers(n_bytes: int) -> int:
    """How many processes to encode `n_bytes` of text with: one per core, or 1, which means none besides this one."""
    if n_bytes <= PARALLEL_ABOVE or multiprocessing.current_process().daemon or _in_ray_worker():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_in_order(
    texts: Iterable[Text], encoding: Encoding, tokenizer: Tokenizer, workers: int
) -> Generator[Encoded, None, None]:
    """Encodes texts of either split; `tokenizer` is what `encoding` describes, for use in this process.

    Close it when leaving it early: the other processes end with it.

    Raises:
        RuntimeError: a child died, of memory for example.
    """
    if workers == 1:
        for split, text in texts:
            yield split, *_encode(tokenizer, text, encoding.marked)
        return
    children = [_Child(encoding) for _ in range(workers)]
    idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
    for child in children:
        idle.put(child)

    def work(batch: list[Text]) -> list[Encoded]:
        child = idle.get()
        try:
            return child.encode(batch)
        finally:
            idle.put(child)

    waiting: deque[Future[list[Encoded]]] = deque()
    try:
        with ThreadPoolExecutor(workers) as pool:
            for batch in _batches(texts):
                waiting.append(pool.submit(work, batch))
                if len(waiting) > 2 * workers:  # else a fast reader would fill the memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
    finally:
        for child in children:
            child.close()


def serve() -> None:
    """The life of a child: reads batches from stdin and writes their tokens to stdout, until stdin ends."""
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not come between the answers
    encoding: Encoding = pickle.load(source)
    tokenizer = load_tokenizer(encoding.spec, encoding.folder)
    while True:
        try:
            batch: list[Text] = pickle.load(source)
        except EOFError:
            return
        encoded = [(split, *_encode(tokenizer, text, encoding.marked)) for split, text in batch]
        try:
            pickle.dump(encoded, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
        except BrokenPipeError:  # the parent was killed
            return


class _Child:
    """A process that encodes, seen from its parent."""

    def __init__(self, encoding: Encoding) -> None:
        # Found again however the parent found it; in a session of its own, so that Ctrl-C is the parent's to handle.
        root = str(Path(__file__).parents[3])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from ngpt.data.tokens.pool import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        self._ask(encoding)

    def encode(self, batch: list[Text]) -> list[Encoded]:
        """Has a batch encoded and waits for it.

        Raises:
            RuntimeError: the process has died.
        """
        self._ask(batch)
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._died() from None

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()  # it holds nothing that could be lost
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:  # it died before it had read everything, which was reported
                continue
        self._process.wait()

    def _ask(self, question: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(question, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _died(self) -> RuntimeError:
        return RuntimeError(f"a process that encodes text ended with exit code {self._process.wait()}")


def _encode(tokenizer: Tokenizer, text: str, marked: bool) -> tuple[np.ndarray, bool]:
    ids = tokenizer.encode(text)
    if marked and tokenizer.document_mark is not None:
        ids = np.concatenate([np.array([tokenizer.document_mark], ids.dtype), ids])
    sizes = tokenizer.token_bytes()
    return ids, sizes is not None and int(sizes[ids].sum()) == len(text.encode())


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
    batch: list[Text] = []
    size = 0
    for split, text in texts:
        batch.append((split, text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_ray_worker() -> bool:
    """Ray gives a worker one core of many; this library does not import Ray to ask."""
    return Path(getattr(sys.modules["__main__"], "__file__", None) or "").name == "default_worker.py"
