"""A campaign run from the command line in a process group of its own, watched and hurt from outside."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers import ROOT
from tune.executors.orphans import MARK, is_alive
from tune.storage.journal import read_journal

SCRIPT = ROOT / "run_campaign.py"


@dataclass
class Run:
    """A run of the script in its own process group, with what it has written so far."""

    root: Path
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_journal(self.root / "journal.jsonl") if event["event"] == name]

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits for something to happen while the run is on its way."""
        for _ in range(2400):
            if happened():
                return
            assert self.process.poll() is None, f"it ended first: {self.err.read_text()}"
            time.sleep(0.05)
        pytest.fail(f"it never happened: {self.err.read_text()}")

    def until_training(self, trials: int) -> None:
        """Waits until so many trials of this start have ended and another one is in the middle."""
        self.until(lambda: len(self.since_start("trial_finished")) >= trials and self.busy() is not None)

    def since_start(self, name: str) -> list[dict[str, Any]]:
        starts = self.events("campaign_started")
        return [event for event in self.events(name) if starts and event["seq"] > starts[-1]["seq"]]

    def busy(self) -> Path | None:
        """The metrics of a trial that has begun to train and has not ended."""
        ended = {event["trial_id"] for event in self.events("trial_finished")}
        for event in self.since_start("trial_started"):
            metrics = self.root / "trials" / event["trial_id"] / "metrics.jsonl"
            if event["trial_id"] not in ended and metrics.exists() and metrics.read_text().count("\n") > 2:
                return metrics
        return None

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        return [child for child in self.family() if " seed " in " ".join(child.cmdline())]

    def beats(self) -> dict[str, dict[str, int]]:
        """The heartbeats of the trials that are training."""
        found = {}
        for path in self.root.glob("trials/*/heartbeat"):
            try:
                found[path.parent.name] = json.loads(path.read_text())
            except (OSError, ValueError):  # it ends, or begins
                continue
        return found

    def driver(self) -> psutil.Process:
        """The process that Ray runs in."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if MARK in child.environ())

    def wait(self) -> int:
        return self.process.wait(timeout=240)


def start(file: Path, out: Path, *options: str) -> Run:
    stdout, stderr = out.with_suffix(".out"), out.with_suffix(".err")
    with stdout.open("wb") as o, stderr.open("wb") as e:
        command = [sys.executable, str(SCRIPT), str(file), "--out", str(out), *options]
        process = subprocess.Popen(command, stdout=o, stderr=e, start_new_session=True)
    return Run(out / "tiny", process, stdout, stderr)


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def left_over(family: list[psutil.Process]) -> list[str]:
    """Those of a family that do not go away. Ray's agents look for a driver that was killed once a minute only."""
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    watched = [process for process in family if _name(process) not in agents]
    for _ in range(600):
        if not any(map(is_alive, watched)):
            break
        time.sleep(0.05)
    return [_name(process) for process in watched if is_alive(process)]
