"""Runs a campaign on a host of a cluster (tests/helpers/hosts.py), to watch and disturb it."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ngpt.system.heartbeat import Heartbeat, read_heartbeat
from tests.helpers.hosts import PORT, ROOT, Host
from tune.storage.journal import read_journal

PATIENCE = 240.0  # seconds until something must have happened


class ClusterRun:
    """The campaign `name` of a file, run on a host of the cluster of `head`, or on the head; `root` are its results."""

    def __init__(
        self,
        head: Host,
        file: Path,
        out: Path | str,
        *,
        name: str = "tiny",
        on: Host | None = None,
        root: Path | None = None,
    ) -> None:
        self._host, self.root = on or head, root or Path(out) / name
        self.err = out.with_suffix(".err") if isinstance(out, Path) else file.with_suffix(".err")
        command = [sys.executable, ROOT / "run_campaign.py", file, "--address", f"{head.address}:{PORT}", "--out", out]
        with self.err.open("a") as err:
            self.process = self._host.start(command, stdout=subprocess.DEVNULL, stderr=err)

    def events(self, name: str) -> list[dict[str, Any]]:
        journal = self.root / "journal.jsonl"
        return [event for event in read_journal(journal) if event["event"] == name] if journal.exists() else []

    def training(self, host: Host) -> tuple[str, Heartbeat] | None:
        """The trial that trains on a host and its heartbeat, once the campaign knows that it has made a step."""
        beats = {folder.name: read_heartbeat(folder) for folder in self.root.glob("trials/*")}
        found = ((name, beat) for name, beat in beats.items() if beat and beat.host == host.name)
        return next(((name, beat) for name, beat in found if beat.step > beat.began), None)

    def training_of(self, trial_id: str) -> Heartbeat | None:
        """The heartbeat of a trial, once the campaign knows that it has made a step."""
        beat = read_heartbeat(self.root / "trials" / trial_id)
        return beat if beat and beat.step > beat.began else None

    def until(self, happened: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (value := happened()):
            assert self.process.poll() is None, f"the run ended first: {self.err.read_text()}"
            assert time.monotonic() < deadline, f"it did not happen: {self.err.read_text()}"
            time.sleep(0.1)
        return value

    def signal(self, number: int) -> int:
        """Sends the run a signal; returns its exit code."""
        (run,) = [pid for pid in processes(self._host, "run_campaign.py") if "nsenter" not in title(pid)]
        os.kill(run, number)
        return self.process.wait(PATIENCE)

    def finish(self) -> None:
        """Waits for the end of the run; fails if it is not a good one."""
        assert self.process.wait(2 * PATIENCE) == 0, self.err.read_text()


def title(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


def processes(host: Host, text: str) -> list[int]:
    return [pid for pid in host.pids() if text in title(pid)]


def worker(host: Host) -> int:
    """The process that trains on a host; 0 if there is none."""
    return next(iter(processes(host, " seed ")), 0)
