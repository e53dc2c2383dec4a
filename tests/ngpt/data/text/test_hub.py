"""Downloads from a local hub: resumed, checked by SHA-256, in parallel, with errors of one line."""

import errno
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ngpt.data.text.hub as downloading
from ngpt.config.base import ConfigError
from ngpt.data.text.hub import HubFile, download, find_file, list_hub
from ngpt.data.text.progress import silent
from tests.helpers import ROOT
from tests.helpers.hub import Handler, Hub, cut_after, status

DATA = np.random.default_rng(0).bytes(300_000)
RANGE = 100_000
ATTEMPTS = downloading.RETRIES + 1
# Downloads into the folder that is its argument.
SCRIPT = f"""
import sys
from pathlib import Path
import ngpt.data.text.hub as hub
hub.RANGE = {RANGE}
hub.download(hub.list_hub("someone/data"), Path(sys.argv[1]), name="data", log=print)
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(downloading, "RANGE", RANGE)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with Hub("someone/data") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
        hub.files["a.bin"] = DATA
        yield hub


def fetch(folder: Path) -> list[Path]:
    return download(list_hub("someone/data"), folder, name="data", log=silent)


def start_download(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.DEVNULL, cwd=ROOT)


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def starts(hub: Hub) -> list[int]:
    return [first for _, first in hub.requests]


def test_the_large_files_of_a_data_set_are_listed_in_order(hub: Hub) -> None:
    hub.files = {f"sub dir/{number}.bin": bytes(number) for number in (2, 0, 1)}
    files = list_hub("someone/data")
    assert [(file.path, file.size) for file in files] == [(f"sub dir/{number}.bin", number) for number in range(3)]
    assert (
        files[1].name == "sub dir-1.bin"
        and files[1].url == f"{hub.url}/datasets/someone/data/resolve/main/sub%20dir/1.bin"
    )
    assert files[0].sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes


def test_only_the_hub_gets_the_token_of_the_user(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    file = list_hub("someone/data")[0]
    download([replace(file, url=f"{hub.url}/cdn/a.bin")], tmp_path / "hub", name="data", log=silent)
    assert hub.tokens == {"Bearer hf_secret"}
    hub.tokens.clear()
    with Hub("someone/else") as other:
        other.files["a.bin"] = DATA
        elsewhere = find_file(f"{other.url}/cdn/a.bin", sha256=str(file.sha256), hint="")
        assert elsewhere.size == len(DATA)
        download([elsewhere], tmp_path / "other", name="data", log=silent)
        assert other.tokens == {None}


def test_files_are_downloaded_once(hub: Hub, tmp_path: Path) -> None:
    hub.files |= {"plain_text/train/0 0.parquet": DATA[::-1]}
    messages: list[str] = []
    paths = download(list_hub("someone/data"), tmp_path / "new", name="data", log=messages.append)
    assert [path.read_bytes() for path in paths] == [DATA, DATA[::-1]]
    assert file_names(tmp_path / "new") == {"a.bin", "plain_text-train-0 0.parquet"}
    assert messages == ["data: downloading 2 files, 0.6 MB"]
    assert fetch(tmp_path / "new") == paths and len(hub.requests) == 6


def test_a_cut_connection_continues_at_the_range_it_broke_in(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [cut_after(RANGE), cut_after(50_000), cut_after(0)]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert starts(hub) == [0, 100_000, 100_000, 100_000, 200_000]


def test_a_connection_that_keeps_breaking_is_an_error_that_keeps_the_partial_file(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [cut_after(RANGE), *[cut_after(0)] * ATTEMPTS]
    with pytest.raises(ConfigError, match=r"cannot download http.*/a\.bin: .*; .*--from PATH"):
        fetch(tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == DATA[:RANGE]


def test_a_partial_file_of_an_earlier_process_is_continued(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA[:223_456])
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert hub.requests == [("a.bin", 223_456)] and file_names(tmp_path) == {"a.bin"}


def test_a_complete_partial_file_needs_no_request(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(DATA)
    assert fetch(tmp_path)[0].read_bytes() == DATA and hub.requests == []


@pytest.mark.parametrize("left", [b"\0" * 1000, b"\0" * len(DATA), b"\0" * (len(DATA) + 1)])
def test_a_partial_file_of_other_content_is_replaced(hub: Hub, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "a.bin.part").write_bytes(left)
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert starts(hub)[-3:] == [0, 100_000, 200_000]


def test_a_server_that_ignores_ranges_sends_the_whole_file(hub: Hub, tmp_path: Path) -> None:
    hub.ranges = False
    (tmp_path / "a.bin.part").write_bytes(DATA[:1000])
    assert fetch(tmp_path)[0].read_bytes() == DATA and starts(hub) == [1000]


def test_a_file_that_is_not_the_published_one_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.published["a.bin"] = "ab" * 32
    with pytest.raises(ConfigError, match=r"a\.bin: its SHA-256 is not abababababab.*--from PATH") as caught:
        fetch(tmp_path)
    assert "\n" not in str(caught.value)
    assert (
        file_names(tmp_path) == set() and starts(hub).count(0) == 2
    )  # the first copy may have been damaged on its way


def test_a_request_to_a_busy_server_is_retried(hub: Hub, tmp_path: Path) -> None:
    hub.faults["a.bin"] = [status(503), cut_after(10), status(429), status(500)]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    hub.files["b.bin"] = b"b"
    hub.faults["b.bin"] = [status(502)] * ATTEMPTS
    with pytest.raises(ConfigError, match=r"b\.bin: .*502 Bad Gateway.*; pass a local copy"):
        fetch(tmp_path)


@pytest.mark.parametrize("code", [401, 403, 404, 410])
def test_a_request_for_a_missing_or_forbidden_file_is_not_retried(hub: Hub, tmp_path: Path, code: int) -> None:
    hub.faults["a.bin"] = [status(code)]
    with pytest.raises(ConfigError, match=rf"resolve/main/a\.bin: .*{code} .*--from PATH") as caught:
        fetch(tmp_path)
    assert len(hub.requests) == 1 and "\n" not in str(caught.value)


def test_an_unknown_data_set_and_no_network_are_errors_of_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"someone/else: .*404.*--from PATH") as unknown:
        list_hub("someone/else")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"cannot download .*someone/data: .*refused.*--from PATH") as unreachable:
        list_hub("someone/data")
    assert "\n" not in f"{unknown.value}{unreachable.value}"


def test_without_the_library_the_error_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"run pip install 'ngpt-campaign\[hf\]'; pass a local copy"):
        list_hub("someone/data")


def test_several_files_are_downloaded_at_once(hub: Hub, tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=30)

    def meet(handler: Handler, data: bytes) -> None:
        together.wait()  # breaks unless all three are requested before one is answered
        handler.send(data)

    hub.files = {name: name.encode() for name in "abc"}
    hub.faults = {name: [meet] for name in "abc"}
    assert [path.read_bytes() for path in fetch(tmp_path)] == [b"a", b"b", b"c"]


def test_an_error_ends_the_other_downloads_and_keeps_their_partial_files(hub: Hub, tmp_path: Path) -> None:
    first_range, missing = threading.Event(), threading.Event()

    def then_wait(handler: Handler, data: bytes) -> None:
        first_range.set()
        missing.wait(30)
        handler.send(data)

    def fail(handler: Handler, data: bytes) -> None:
        first_range.wait(30)
        handler.fail(404)
        missing.set()

    hub.files["b.bin"] = DATA
    hub.faults = {"a.bin": [cut_after(RANGE), then_wait, then_wait], "b.bin": [fail]}
    with pytest.raises(ConfigError, match=r"b\.bin: .*404"):
        fetch(tmp_path)
    assert DATA.startswith((tmp_path / "a.bin.part").read_bytes()[: 2 * RANGE])
    assert "b.bin" not in file_names(tmp_path)


def test_a_killed_download_is_continued_by_the_next_process(hub: Hub, tmp_path: Path) -> None:
    waiting, killed = threading.Event(), threading.Event()

    def stall(handler: Handler, data: bytes) -> None:
        waiting.set()
        killed.wait(60)

    hub.faults["a.bin"] = [cut_after(RANGE), cut_after(RANGE), stall]
    process = start_download(tmp_path)
    try:
        assert waiting.wait(60)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        killed.set()
    assert (tmp_path / "a.bin.part").read_bytes() == DATA[: 2 * RANGE]
    assert fetch(tmp_path)[0].read_bytes() == DATA
    assert hub.requests[-1] == ("a.bin", 2 * RANGE) and file_names(tmp_path) == {"a.bin"}


def test_a_full_disk_is_reported_before_the_first_byte(hub: Hub, tmp_path: Path) -> None:
    huge = shutil.disk_usage(tmp_path).free + 10**9
    with pytest.raises(OSError, match="GB to download") as caught:
        download([HubFile("huge", f"{hub.url}/cdn/huge", huge, "")], tmp_path, name="data", log=silent)
    assert caught.value.errno == errno.ENOSPC and hub.requests == []


def test_two_processes_share_one_download(hub: Hub, tmp_path: Path) -> None:
    running = [start_download(tmp_path) for _ in range(2)]
    try:
        assert [process.wait(60) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert starts(hub) == [0, 100_000, 200_000] and (tmp_path / "a.bin").read_bytes() == DATA
