"""Encoding in several processes: in order, wherever the caller lives, and without leaving anybody behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ngpt.data.tokens import pool
from ngpt.data.tokens.pool import Encoding, default_workers, encode_in_order
from ngpt.data.tokens.tokenizer import load_tokenizer
from tests.helpers.vocabularies import write_llama

TEXTS = [("val" if index % 7 == 0 else "train", f"the fox {index} thinks\n" * (1 + index % 5)) for index in range(400)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model") / "a.model")


def encoded(model: Path, workers: int, *, marked: bool = True) -> list[tuple[str, list[int], bool]]:
    encoding = Encoding(str(model), model.parent, marked)
    tokenizer = load_tokenizer(str(model), None)
    return [(split, ids.tolist(), same) for split, ids, same in encode_in_order(TEXTS, encoding, tokenizer, workers)]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_texts_come_back_encoded_in_order(model: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BATCH", 700)
    tokenizer = load_tokenizer(str(model), None)
    expected = [(split, [1, *tokenizer.encode(text).tolist()], True) for split, text in TEXTS]
    assert encoded(model, workers) == expected


def test_without_marks_a_text_is_as_it_is(model: Path) -> None:
    tokenizer = load_tokenizer(str(model), None)
    found = encoded(model, 1, marked=False)
    assert [ids for _, ids, _ in found] == [tokenizer.encode(text).tolist() for _, text in TEXTS]
    assert not any(same for *_, same in found)  # the space that such a model adds is one byte too many


def test_the_reader_is_never_far_ahead(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BATCH", 1)  # a batch for every text
    n_read, n_done, ahead = 0, 0, []

    def reader() -> Iterator[tuple[str, str]]:
        nonlocal n_read
        for text in TEXTS:
            n_read += 1
            yield text

    encoding = Encoding(str(model), model.parent, marked=True)
    for _ in encode_in_order(reader(), encoding, load_tokenizer(str(model), None), 2):
        n_done += 1
        ahead.append(n_read - n_done)
    assert n_done == len(TEXTS) and max(ahead) <= 5


def test_a_dead_process_is_an_error_and_not_a_gap(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "BATCH", 1)
    born: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen.__init__

    def remember(self: subprocess.Popen[bytes], *arguments: object, **named: object) -> None:
        start(self, *arguments, **named)  # type: ignore[arg-type]
        born.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", remember)
    encoding = Encoding(str(model), model.parent, marked=True)
    found = encode_in_order(TEXTS, encoding, load_tokenizer(str(model), None), 2)
    next(found)
    born[0].send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        list(found)
    assert [process.poll() for process in born] == [-9, -9]  # the other one was stopped


def test_an_abandoned_encoding_stops_its_processes(model: Path) -> None:
    def children() -> set[str]:
        pids = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
        return {pid for pid in pids if Path(f"/proc/{pid}").exists()}

    before = children()  # what other tests have left, such as the tracker of multiprocessing
    encoding = Encoding(str(model), model.parent, marked=True)
    found = encode_in_order(TEXTS, encoding, load_tokenizer(str(model), None), 2)
    next(found)
    own = children() - before
    assert own
    found.close()
    assert not own & children()


def test_the_processes_of_a_killed_parent_end(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from ngpt.data.tokens.pool import *; "
        "from ngpt.data.tokens.pool import _Child; "
        "children = [_Child(Encoding(sys.argv[1], Path('.'), True)) for _ in range(2)]; "
        "print(*[child._process.pid for child in children], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.02)
    assert len(children) == 2


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def report_workers(queue: "multiprocessing.SimpleQueue[int]") -> None:
    queue.put(default_workers(10**9))


def test_small_texts_and_daemons_are_encoded_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert default_workers(1_000_000) == 1 and default_workers(10**9) == 3
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=report_workers, args=(queue,), daemon=True)
    process.start()
    process.join(60)
    assert queue.get() == 1
    queue.close()


def test_a_ray_worker_keeps_to_its_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/x/ray/_private/workers/default_worker.py", raising=False)
    assert default_workers(10**9) == 1


def test_a_daemonic_process_may_still_be_told_to_use_others(model: Path) -> None:
    """And a script without `if __name__ == "__main__"`, from stdin: both are what multiprocessing stumbles over."""
    script = (
        f"from pathlib import Path\nfrom ngpt.data.tokens.pool import Encoding, encode_in_order\n"
        f"from ngpt.data.tokens.tokenizer import load_tokenizer\n"
        f"found = encode_in_order([('train', 'the fox')], Encoding({str(model)!r}, Path('.'), True), "
        f"load_tokenizer({str(model)!r}, None), 2)\nprint(len(list(found)))\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_tokens_are_uint16(model: Path) -> None:
    encoding = Encoding(str(model), model.parent, marked=True)
    found = list(encode_in_order(TEXTS[:3], encoding, load_tokenizer(str(model), None), 1))
    assert all(ids.dtype == np.uint16 for _, ids, _ in found)
