"""Campaigns whose results are on an S3 server: killed machines, cut lines and wrong addresses."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers import ROOT
from tests.helpers.object_store import SECRET, Line, environment, make_bucket, s3_server
from tests.helpers.stored_results import METRICS, add_event, visible_files, write
from tests.helpers.tiny_campaign import losses, train_all, write_file
from tune.remote import results
from tune.remote.places import store_checks, working_folder
from tune.remote.results import INTERVAL_VARIABLE, RemoteResults, local_folder, upload_interval
from tune.remote.store import StoreError, open_store
from tune.remote.unit import read_digests
from tune.remote.uri import Uri

OUT = "s3://bucket/runs"
TIMEOUT = 240.0  # seconds for a state that a loaded machine reaches in a few


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("moto")) as port:
        yield port


@pytest.fixture
def line(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """What this test reaches the server by; the bucket is there."""
    line = Line(server)
    for name, value in environment(line.port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(INTERVAL_VARIABLE, "1")
    make_bucket("bucket")
    yield line
    line.cut()


class Machine:
    """A machine of the user: its cache holds nothing of another one."""

    def __init__(self, cache: Path, file: Path) -> None:
        self.cache, self._file, self._log = cache, file, cache.with_suffix(".log")
        # The prepared corpus is the same everywhere; to prepare it again would only take time.
        shutil.copytree(os.environ["NGPT_CACHE"], cache, ignore=shutil.ignore_patterns("remote"))

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, ROOT / "run_campaign.py", self._file, "--inline", "--out", OUT]
        environment = os.environ | {"NGPT_CACHE": str(self.cache)}
        with self._log.open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def printed(self) -> str:
        """What the newest run has printed."""
        return self._log.read_text()

    @property
    def root(self) -> Path:
        (root,) = self.cache.glob("remote/*/tiny")
        return root


def unfinished_with_checkpoint() -> bool:
    """Whether the store has a trial that ended, and another one that has a checkpoint but no result yet."""
    store = open_store(Uri(f"{OUT}/tiny"))
    journal = (store.read("journal.jsonl") or b"").splitlines()
    events = [json.loads(line) for line in journal]
    ended = {event["trial_id"] for event in events if event["event"] == "trial_finished"}
    started = {event["trial_id"] for event in events if event["event"] == "trial_started"}
    units = [read_digests(store, f"trials/{trial_id}") or {} for trial_id in started - ended]
    return bool(ended) and any("checkpoints/" in path for unit in units for path in unit)


@pytest.mark.slow
def test_a_killed_campaign_goes_on_on_a_fresh_machine_with_the_same_numbers(
    line: Line, tmp_path: Path, corpus: Path
) -> None:
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.2, 0.4]}\n"
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]", steps=150, every=25)
    train_all(file, undisturbed := tmp_path / "undisturbed")
    first, second = Machine(tmp_path / "first", file), Machine(tmp_path / "second", file)
    run, deadline = first.start(), time.monotonic() + TIMEOUT
    while not unfinished_with_checkpoint():
        assert run.poll() is None and time.monotonic() < deadline, first.printed()
        time.sleep(0.2)
    run.send_signal(signal.SIGKILL)
    run.wait()
    shutil.rmtree(first.cache)
    refused = 0
    while (code := second.start().wait(TIMEOUT)) == 3:  # until the lease of the killed run ends
        refused += 1
        assert "in use by another run" in second.printed()
        assert refused < 10
    assert code == 0, second.printed()
    assert losses(second.root) == losses(undisturbed)
    journal = [json.loads(text) for text in (second.root / "journal.jsonl").read_text().splitlines()]
    ended = [event["trial_id"] for event in journal if event["event"] == "trial_finished"]
    assert len(ended) == len(set(ended)) == 3  # what the first machine finished was not trained again
    steps = {path.parent.name: rows(path) for path in second.root.glob("trials/*/metrics.jsonl")}
    assert steps == {path.parent.name: rows(path) for path in undisturbed.glob("trials/*/metrics.jsonl")}
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert run_campaign.main(["verify", f"{OUT}/tiny"]) == 0
    assert out.getvalue().startswith(f"{OUT}/tiny: intact")


def rows(path: Path) -> list[tuple[int, float | None]]:
    """The steps and losses of a metrics file."""
    found = [json.loads(text) for text in path.read_text().splitlines()]
    return [(row["step"], row.get("train_loss")) for row in found]


@pytest.mark.slow
def test_a_line_that_is_cut_stops_no_run_and_loses_nothing(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    lines: list[str] = []
    with RemoteResults(Uri("s3://bucket/cut/tiny")) as remote:
        remote.message = lines.append
        line.cut()
        add_event(remote.root)
        write(remote.root / METRICS, "row 10\n")
        until(lambda: bool(lines))
        assert lines[0].startswith("s3://bucket/cut/tiny: the server cannot be reached; training goes on")
        assert str(remote.root) in lines[0]
        line.mend()
        until(lambda: len(lines) > 1)
        assert lines[1:] == ["s3://bucket/cut/tiny: reached again, all results are uploaded"]
        write(remote.root / METRICS, "row 10\nrow 20\n")
        expected = visible_files(remote.root)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(results, "FINAL_SECONDS", 0.0)
    with (
        pytest.raises(StoreError, match="run the same command again to upload them") as caught,
        RemoteResults(Uri("s3://bucket/cut/tiny")) as remote,
    ):
        assert visible_files(remote.root) == expected
        add_event(remote.root)
        line.cut()
    assert str(remote.root) in str(caught.value)


def until(condition) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_an_address_that_cannot_be_used_is_one_line(
    line: Line, tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path, corpus)

    def refusal(*arguments: str) -> tuple[int, str]:
        code = run_campaign.main([str(file), "--inline", *arguments])
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        (text,) = printed.err.splitlines()
        return code, text

    code, text = refusal("--out", "s3://nobody/runs")
    assert (code, text) == (2, "s3://nobody/runs: there is no bucket nobody: create it, or correct the address")
    code, text = refusal("--out", f"s3://tests:{SECRET}@bucket/runs?colour=red")
    assert code == 2 and "colour" in text
    assert run_campaign.main(["status", f"{OUT}/nothing"]) == 2
    assert "is not a results directory" in capsys.readouterr().err
    line.cut()
    code, text = refusal("--out", OUT)
    assert code == 74 and text.endswith("the server cannot be reached")
    line.mend()


def test_the_machine_keeps_one_folder_for_each_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path))
    folder = local_folder(Uri("s3://bucket/runs"))
    assert folder.parent == tmp_path / "remote"
    assert folder == local_folder(Uri("s3://key:secret@bucket/runs/")) != local_folder(Uri("s3://bucket/others"))


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon", "1e9"])
def test_an_interval_that_makes_no_sense_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERVAL_VARIABLE, text)
    with pytest.raises(ConfigError, match=rf"{INTERVAL_VARIABLE} must be from 1 to 3600 seconds, got '{text}'"):
        upload_interval()


def test_doctor_tries_the_store(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    (check,) = store_checks(Uri(OUT))
    assert (check.name, check.value, check.problem) == ("object store", OUT, None)
    (check,) = store_checks(Uri("s3://no-such-bucket/runs"))
    assert check.problem is not None and "there is no bucket no-such-bucket" in check.problem
    assert list(store_checks(tmp_path)) == [] and working_folder(tmp_path) == tmp_path
