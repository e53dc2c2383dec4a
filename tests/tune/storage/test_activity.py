"""The file that says what a run does: complete at any moment, rarely written, gone with the run that ends by itself."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from ngpt.data.text.progress import Meter
from ngpt.system.heartbeat import host_name
from tune.storage.activity import ACTIVITY, ActivityFile, read_activity


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def names(root: Path) -> list[str]:
    run = read_activity(root)
    return [] if run is None else [each.name for each in run.activities]


def test_the_file_names_the_process_and_everything_that_it_does(tmp_path: Path) -> None:
    with ActivityFile(tmp_path, campaign="tiny", smoke=True) as file:
        file.change(trials=32, phases=3)
        with file.doing("preparing data"):
            with file.doing("starting Ray"):
                assert names(tmp_path) == ["preparing data", "starting Ray"]
            assert names(tmp_path) == ["preparing data"]
        run = read_activity(tmp_path)
        assert run is not None
        assert (run.campaign, run.smoke, run.trials, run.phases, run.begun) == ("tiny", True, 32, 3, False)
        assert (run.pid, run.host, run.activities) == (os.getpid(), host_name(), ())
    assert not any(tmp_path.iterdir())


def test_progress_and_lines_reach_the_file_and_the_log_behind_it(tmp_path: Path) -> None:
    said: list[str] = []
    clock = Clock()
    with ActivityFile(tmp_path, campaign="tiny", clock=clock) as file, file.doing("preparing data"):
        log = file.log("preparing data", said.append)
        clock.now += 10
        log("docs: tokenizing")
        meter = Meter(log, "docs", clock=clock)
        clock.now += 10
        meter.update(1000, "tokens", fraction=0.4)
        run = read_activity(tmp_path)
    assert said == ["docs: tokenizing", "docs: 1,000 tokens, 100/s, 40 %, 0:00:15 to go"]
    assert run is not None
    (activity,) = run.activities
    assert (activity.detail, activity.fraction, activity.seconds_left) == ("docs", 0.4, pytest.approx(15.0))


def test_updates_are_written_at_most_twice_a_second_and_the_last_one_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[Any] = []

    class Timer(threading.Timer):
        def start(self) -> None:  # the test fires it
            timers.append(self)

    monkeypatch.setattr("tune.storage.activity.threading.Timer", Timer)
    clock, seen = Clock(), set[str]()
    with ActivityFile(tmp_path, campaign="tiny", clock=clock) as file, file.doing("preparing data"):
        for number in range(1000):
            clock.now += 0.01
            file.update("preparing data", fraction=number / 1000)
            seen.add((tmp_path / ACTIVITY).read_text())
            while timers and number < 999:
                clock.now += timers[-1].interval
                timers.pop().function()
        assert len(seen) <= 1 + clock.now / 0.5
        timers.pop().function()
        run = read_activity(tmp_path)
    assert run is not None and run.activities[0].fraction == 0.999


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"campaign": "x"}),
        json.dumps({"campaign": "x", "pid": 0, "host": "h", "started": "now", "written": "now"}),
        " " * (1 << 17) + "{}",
    ],
)
def test_what_no_run_has_written_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / ACTIVITY).write_text(text)
    assert read_activity(tmp_path) is None


def test_a_forged_number_or_a_pipe_says_nothing(tmp_path: Path) -> None:
    with ActivityFile(tmp_path, campaign="tiny") as file, file.doing("preparing data"):
        data = json.loads((tmp_path / ACTIVITY).read_text())
        for name, value in (
            ("pid", -1),
            ("pid", True),
            ("begun", "yes"),
            ("host", "h" * 300),
            ("started", "0001-01-01"),
        ):
            (tmp_path / ACTIVITY).write_text(json.dumps(data | {name: value}))
            assert read_activity(tmp_path) is None, name
        data["activities"][0]["fraction"] = 1e9
        (tmp_path / ACTIVITY).write_text(json.dumps(data))
        assert read_activity(tmp_path) is None
        (tmp_path / ACTIVITY).unlink()
        os.mkfifo(tmp_path / ACTIVITY)
        assert read_activity(tmp_path) is None


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    with ActivityFile(tmp_path / "nowhere", campaign="tiny") as file, file.doing("preparing data"):
        file.update("preparing data", fraction=0.5)
        assert file.run.activities[0].fraction == 0.5
