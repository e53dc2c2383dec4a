"""Progress lines, with a fake clock."""

import re

import pytest

from ngpt.data.text.progress import Meter, Progress, TerminalLog
from ngpt.system.cli import erase_status
from tests.ngpt.system.test_cli import on_terminal


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_short_work_logs_nothing() -> None:
    said: list[str] = []
    clock = Clock()
    meter = Meter(said.append, "x", clock=clock)
    for _ in range(100):
        clock.now += 0.049
        meter.update(1000, "tokens", fraction=0.5)
    assert said == []


def test_a_line_every_few_seconds_has_rate_and_remaining_time() -> None:
    said: list[str] = []
    clock = Clock()
    meter = Meter(said.append, "docs", clock=clock)
    for second in range(1, 13):
        clock.now += 1
        meter.update(1000 * second, "tokens", fraction=second / 100)
    assert said == [
        "docs: 5,000 tokens, 1,000/s, 5 %, 0:01:35 to go",
        "docs: 10,000 tokens, 1,000/s, 10 %, 0:01:30 to go",
    ]


@pytest.mark.parametrize(
    ("fraction", "before", "end"),
    [
        (0.75, 0.5, "1,000/s, 75 %, 0:00:10 to go"),  # a quarter took ten seconds
        (0.5, 0.5, "1,000/s"),
        (1.1, 0.0, "1,000/s"),  # an estimate that was too small
        (1 / 1001, 0.0, "1,000/s, 0 %, 2:46:40 to go"),
    ],
)
def test_the_remaining_time_is_shown_if_it_is_known(fraction: float, before: float, end: str) -> None:
    said: list[str] = []
    clock = Clock()
    meter = Meter(said.append, "docs", clock=clock)
    clock.now += 10
    meter.update(10_000, "tokens", fraction=fraction, before=before)
    assert said == [f"docs: 10,000 tokens, {end}"]


def test_lines_become_rare(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    meter = Meter(TerminalLog(), "docs", clock=clock)
    for second in range(1, 3601):
        clock.now += 1
        meter.update(second, "tokens", fraction=second / 3600)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and "\x1b" not in err
    assert [line.split()[1] for line in lines[:3]] == ["5", "10", "15"]
    # From 50 s on, each line comes when a tenth more time has passed: ln(72) / ln(10/9) = 41 lines, and 10 before.
    assert 45 < len(lines) < 55


def test_a_terminal_gets_a_bar_that_is_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, clock = on_terminal(monkeypatch), Clock()
    meter = Meter(TerminalLog(), "docs", clock=clock)
    for _ in range(100):
        clock.now += 0.02  # two seconds, in which the bar is drawn at most twenty times
        meter.update(int(1000 * (clock.now - 100)), "tokens", fraction=(clock.now - 100) / 8)
    erase_status()
    text = terminal.text()
    assert "\n" not in text and 10 < text.count("docs") <= 20
    last = text.split("\r\x1b[K")[-2]
    assert re.search(r"  0:00:06 left  \S+/s  1\.9\dk tokens$", last) and " 24 %" in last


def test_quiet_means_lines_and_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    clock, log = Clock(), TerminalLog(quiet=True)
    meter = Meter(log, "docs", clock=clock)
    clock.now += 60
    meter.update(1000, "tokens", fraction=0.5)
    log("docs: tokenizing")
    assert capsys.readouterr().err == "docs: tokenizing\n"


@pytest.mark.parametrize(
    ("width", "bar"),
    [
        (90, f"web {9 * '━'}{21 * '─'}  31 %  0:00:22 left  1.24M/s  12.4M tokens"),
        (60, f"web {4 * '━'}{9 * '─'}  31 %  0:00:22 left  1.24M/s  12.4M tokens"),
        (40, f"web {2 * '━'}{5 * '─'}  31 %  0:00:22 left  1.24M/s"),
        (30, f"web {2 * '━'}{4 * '─'}  31 %  0:00:22 left"),
        (10, "web  31 %"),
        (5, "web  "),
    ],
)
def test_a_narrow_terminal_gets_fewer_numbers(width: int, bar: str) -> None:
    assert Progress("web", 12_400_000, "tokens", 10.0, 0.31, 22.2).bar(width) == bar


def test_bytes_have_their_units() -> None:
    assert Progress("web", 15_500_000, "bytes", 4.0).bar(80) == "web  3.88 MB/s  15.5 MB"
    assert Progress("web", 999, "bytes", 1.0).bar(80) == "web  999 B/s  999 B"
