"""Downloads from a hub of our own: resumed where they broke off, checked, and clear about what went wrong."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ngpt.data.text.hub as downloading
from ngpt.config.base import ConfigError
from ngpt.data.text.hub import HubFile, download, list_hub
from ngpt.data.text.progress import silent
from tests.helpers.hub import Handler, Hub, cut_after, status

DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    with Hub("someone/data") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        hub.files["a.bin"] = DATA
        yield hub


def fetch(folder: Path) -> list[Path]:
    return download(list_hub("someone/data"), folder, name="data", log=silent)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_the_large_files_of_a_data_set_are_listed_page_by_page(hub: Hub) -> None:
    hub.files = {f"sub dir/{number}.bin": bytes(number) for number in range(9)}
    hub.page = 4
    files = list_hub("someone/data")
    assert [(file.path, file.size) for file in files] == [(f"sub dir/{number}.bin", number) for number in range(9)]
    assert hub.listed == 3 and files[1].name == "sub dir-1.bin"
    assert files[0].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of nothing


def test_files_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"plain_text/train/0 0.parquet": DATA[::-1]}
    said: list[str] = []
    paths = download(list_hub("someone/data"), tmp_path / "new", name="data", log=said.append)
    assert [path.read_bytes() for path in paths] == [DATA, DATA[::-1]]
    assert visible(tmp_path / "new") == {"a.bin", "plain_text-train-0 0.parquet"}
    assert said == ["data: downloading 2 files, 0.6 MB"]
    assert fetch(tmp_path / "new") == paths and len(hub.requests) == 2


def test_a_cut_connection_is_continued_where_it_broke_off(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [cut_after(100_000), cut_after(50_000), cut_after(0)]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert [wanted for _, wanted in hub.requests] == [None, "bytes=100000-", "bytes=150000-", "bytes=150000-"]


def test_progress_forgives_any_number_of_cuts_and_standing_still_does_not(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [cut_after(10_000)] * (3 * downloading.ATTEMPTS)
    assert fetch(tmp_path)[0].read_bytes() == DATA
    hub.files["b.bin"] = DATA
    hub.faults["b.bin"] = [cut_after(7), *[cut_after(0)] * downloading.ATTEMPTS]
    with pytest.raises(ConfigError, match=r"b\.bin: the connection ended after 7 of 300,000 bytes; .*--from PATH"):
        fetch(tmp_path)
    assert (tmp_path / "b.bin.part").read_bytes() == DATA[:7]


def test_what_an_earlier_process_left_is_continued(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:123_456])
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert hub.requests == [("a.bin", "bytes=123456-")] and visible(tmp_path) == {"a.bin"}


def test_a_complete_part_needs_no_request(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA)
    assert fetch(tmp_path)[0].read_bytes() == DATA and hub.requests == []


@pytest.mark.parametrize("left", [b"\0" * 1000, b"\0" * len(DATA), b"\0" * (len(DATA) + 1)])
def test_what_is_left_of_another_file_is_not_kept(hub: Hub, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "a.bin.part").write_bytes(left)
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert hub.requests[-1] == ("a.bin", None)


def test_a_server_without_ranges_sends_all_of_it_again(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    hub.faults["a.bin"] = [cut_after(200_000)]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert [wanted for _, wanted in hub.requests] == [None, "bytes=200000-"]


def test_a_range_that_was_not_asked_for_is_not_appended(hub: Hub, tmp_path: Path) -> None:
    def other_range(handler: Handler, data: bytes) -> None:
        handler._answer(206, data[5:], **{"Content-Range": f"bytes 5-{len(data) - 1}/{len(data)}"})

    hub.faults["a.bin"] = [cut_after(1000), other_range]
    assert fetch(tmp_path)[0].read_bytes() == DATA


def test_a_file_that_is_not_the_published_one_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.published["a.bin"] = "ab" * 32
    with pytest.raises(ConfigError, match=r"a\.bin: its SHA-256 is not abababababab.*--from PATH") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert visible(tmp_path) == set() and len(hub.requests) == 2  # damaged on the way it may have been once


def test_a_server_in_trouble_is_asked_again(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [status(503), cut_after(10), status(429), status(500)]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    hub.files["b.bin"] = b"b"
    hub.faults["b.bin"] = [status(502)] * downloading.ATTEMPTS
    with pytest.raises(ConfigError, match=r"b\.bin: HTTP 502 Bad Gateway; pass a local copy"):
        fetch(tmp_path)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_what_is_not_there_is_asked_for_once(hub: Hub, tmp_path: Path, code: int) -> None:
    hub.faults["a.bin"] = [status(code)]
    with pytest.raises(ConfigError, match=rf"resolve/main/a\.bin: HTTP {code} .*--from PATH"):
        fetch(tmp_path)
    assert len(hub.requests) == 1


def test_an_unknown_data_set_and_a_hub_that_is_not_there_are_errors_of_one_line(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"datasets/someone/else/tree/main.*HTTP 404"):
        list_hub("someone/else")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cannot download http://127\.0\.0\.1:1/.*refused.*--from PATH") as caught:
        list_hub("someone/data")
    assert "\n" not in str(caught.value)


def test_several_files_are_on_their_way_at_once(hub: Hub, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=30)

    def meet(handler: Handler, data: bytes) -> None:
        together.wait()  # breaks unless all three are asked for before one is answered
        handler.send(data)

    hub.files = {name: name.encode() for name in "abc"}
    hub.faults = {name: [meet] for name in "abc"}
    assert [path.read_bytes() for path in fetch(tmp_path)] == [b"a", b"b", b"c"]


def test_an_error_ends_the_other_downloads_and_keeps_what_they_have(hub: Hub, tmp_path: Path) -> None:
    started, over = threading.Event(), threading.Event()

    def dribble(handler: Handler, data: bytes) -> None:
        handler.send(data, stop_after=5)
        started.set()
        try:
            while not over.wait(0.01):
                handler.wfile.write(b"x")
        except OSError:
            return

    def missing(handler: Handler, data: bytes) -> None:
        started.wait(30)
        handler.fail(404)

    hub.files["b.bin"] = DATA
    hub.faults = {"a.bin": [dribble], "b.bin": [missing]}
    with pytest.raises(ConfigError, match=r"b\.bin: HTTP 404"):
        fetch(tmp_path)
    over.set()
    assert visible(tmp_path) == {"a.bin.part"}


def test_a_killed_download_leaves_a_part_and_the_next_one_continues_it(hub: Hub, tmp_path: Path) -> None:
    killed = threading.Event()

    def stall(handler: Handler, data: bytes) -> None:
        handler.send(data, stop_after=200_000)
        killed.wait(60)

    hub.faults["a.bin"] = [stall]
    code = (
        "import sys; from pathlib import Path; from ngpt.data.text.hub import download, list_hub; "
        "download(list_hub('someone/data'), Path(sys.argv[1]), name='data', log=print)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.DEVNULL)
    part = tmp_path / "a.bin.part"
    while not (part.exists() and part.stat().st_size == 200_000):
        assert process.poll() is None
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    killed.set()
    assert visible(tmp_path) == {"a.bin.part"}
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert hub.requests[-1] == ("a.bin", "bytes=200000-")


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = shutil.disk_usage(tmp_path).free + 10**9
    with pytest.raises(OSError, match="GB to download") as caught:
        download([HubFile("huge", f"{hub.url}/cdn/huge", huge, "")], tmp_path, name="data", log=silent)
    assert caught.value.errno == errno.ENOSPC and hub.requests == []


def test_two_processes_share_one_download(hub: Hub, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ngpt.data.text.hub import download, list_hub; "
        "download(list_hub('someone/data'), Path(sys.argv[1]), name='data', log=print)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(hub.requests) == 1 and (tmp_path / "a.bin").read_bytes() == DATA
