"""Progress lines, with a fake clock."""

import pytest

from ngpt.data.text.progress import Meter


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
