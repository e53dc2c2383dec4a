"""Runs a campaign from the command line in its own process group, to watch and disturb it from outside."""

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
from tune.executors.orphans import RESULTS_VARIABLE, is_alive, kill_marked
from tune.storage.journal import read_journal

SCRIPT = ROOT / "run_campaign.py"


@dataclass
class Run:
    """A run of the script: its process and the files it writes."""

    root: Path
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_journal(self.root / "journal.jsonl") if event["event"] == name]

    def until(self, happened: Callable[[], bool]) -> None:
        """Waits until a condition holds; fails if the run ends first."""
        for _ in range(2400):
            if happened():
                return
            assert self.process.poll() is None, f"the run ended first: {self.err.read_text()}"
            time.sleep(0.05)
        pytest.fail(f"the condition never held: {self.err.read_text()}")

    def until_training(self, trials: int) -> None:
        """Waits until `trials` trials of this start have finished and another one is training."""
        self.until(lambda: len(self.since_start("trial_finished")) >= trials and self.busy() is not None)

    def since_start(self, name: str) -> list[dict[str, Any]]:
        starts = self.events("campaign_started")
        return [event for event in self.events(name) if starts and event["seq"] > starts[-1]["seq"]]

    def busy(self) -> Path | None:
        """The metrics file of a trial that is training."""
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
            except (OSError, ValueError):  # it is being created or removed
                continue
        return found

    def ray_process(self) -> psutil.Process:
        """The child process that runs Ray."""
        children = psutil.Process(self.process.pid).children()
        return next(child for child in children if RESULTS_VARIABLE in child.environ())

    def wait(self) -> int:
        return self.process.wait(timeout=240)

    def end(self) -> None:
        """Kills the run, if it has not ended, and everything that it has started."""
        self.process.kill()
        self.process.wait()
        kill_marked(self.root)


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
    """Names of the processes that do not exit. Ray's agents are left out: they look for their driver once a minute."""
    agents = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    watched = [process for process in family if _name(process) not in agents]
    for _ in range(600):
        if not any(map(is_alive, watched)):
            break
        time.sleep(0.05)
    return [_name(process) for process in watched if is_alive(process)]
