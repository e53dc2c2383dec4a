"""The watchdog finds trials that hang, from given heartbeats at given times."""

import pytest

from ngpt.system.heartbeat import Heartbeat
from tune.executors.watchdog import MIN_TIMEOUT, TIMEOUT_STEPS, Watchdog


def beat(step: int, pid: int = 1) -> Heartbeat:
    return Heartbeat(pid, 0, step)


def test_a_trial_that_makes_steps_never_hangs() -> None:
    watchdog = Watchdog(stall_timeout=10)
    assert all(watchdog.find_hung({"t": (1, beat(second // 9))}, second) == {} for second in range(500))


def test_a_trial_whose_heartbeat_does_not_change_hangs_after_the_timeout() -> None:
    watchdog = Watchdog(stall_timeout=10)
    assert watchdog.find_hung({"t": (1, beat(1)), "u": (1, beat(1))}, 100.0) == {}
    assert watchdog.find_hung({"t": (1, beat(1)), "u": (1, beat(2))}, 109.0) == {}
    assert watchdog.find_hung({"t": (1, beat(1)), "u": (1, beat(2))}, 111.0) == {"t": 11.0}
    assert watchdog.find_hung({"t": (1, beat(1)), "u": (1, beat(2))}, 120.0) == {"t": 20.0, "u": 11.0}


def test_another_attempt_starts_a_new_timeout() -> None:
    watchdog = Watchdog(stall_timeout=10)
    watchdog.find_hung({"t": (1, beat(5))}, 0.0)
    assert watchdog.find_hung({"t": (1, beat(5))}, 11.0) == {"t": 11.0}
    assert watchdog.find_hung({"t": (2, beat(5, pid=2))}, 12.0) == {}
    assert watchdog.find_hung({}, 13.0) == {}
    assert watchdog.find_hung({"t": (2, beat(5, pid=2))}, 30.0) == {}, "it was not running in between"


@pytest.mark.parametrize("first", [None, beat(0), Heartbeat(1, 40, 40)])
def test_a_process_has_ten_minutes_to_its_first_step_even_with_a_short_timeout(first: Heartbeat | None) -> None:
    watchdog = Watchdog(stall_timeout=10)
    watchdog.find_hung({"t": (1, first)}, 0.0)
    assert watchdog.find_hung({"t": (1, first)}, MIN_TIMEOUT - 1) == {}
    assert watchdog.find_hung({"t": (1, first)}, MIN_TIMEOUT + 1) == {"t": MIN_TIMEOUT + 1}


@pytest.mark.parametrize(
    ("seconds_per_step", "timeout"), [(0.01, MIN_TIMEOUT), (1.0, MIN_TIMEOUT), (120.0, TIMEOUT_STEPS * 120.0)]
)
def test_the_default_timeout_is_twenty_median_steps_and_at_least_ten_minutes(
    seconds_per_step: float, timeout: float
) -> None:
    watchdog, now = Watchdog(), 0.0
    for step in range(30):
        now += 1000.0 if step == 1 else 10 * seconds_per_step  # the first one was compiled
        assert watchdog.find_hung({"t": (1, beat(10 * step))}, now) == {}
    assert watchdog.timeout("t") == pytest.approx(timeout)
    assert watchdog.find_hung({"t": (1, beat(290))}, now + timeout - 1) == {}
    assert watchdog.find_hung({"t": (1, beat(290))}, now + timeout + 1) == {"t": pytest.approx(timeout + 1)}
