"""Which trials hang: told by hand what their heartbeats are, and what time it is."""

import pytest

from ngpt.system.heartbeat import Beat
from tune.executors.watchdog import AT_LEAST, STEPS, Watchdog


def beat(step: int, pid: int = 1) -> Beat:
    return Beat(pid, 0, step)


def test_a_trial_that_makes_steps_never_hangs() -> None:
    watchdog = Watchdog(stall_timeout=10)
    assert all(watchdog.look({"t": (1, beat(second // 9))}, second) == {} for second in range(500))


def test_one_whose_heartbeat_stands_still_does_after_the_timeout() -> None:
    watchdog = Watchdog(stall_timeout=10)
    assert watchdog.look({"t": (1, beat(0)), "u": (1, beat(0))}, 100.0) == {}
    assert watchdog.look({"t": (1, beat(0)), "u": (1, beat(1))}, 109.0) == {}
    assert watchdog.look({"t": (1, beat(0)), "u": (1, beat(1))}, 111.0) == {"t": 11.0}
    assert watchdog.look({"t": (1, beat(0)), "u": (1, beat(1))}, 120.0) == {"t": 20.0, "u": 11.0}


def test_another_attempt_begins_anew() -> None:
    watchdog = Watchdog(stall_timeout=10)
    watchdog.look({"t": (1, beat(5))}, 0.0)
    assert watchdog.look({"t": (1, beat(5))}, 11.0) == {"t": 11.0}
    assert watchdog.look({"t": (2, beat(5, pid=2))}, 12.0) == {}
    assert watchdog.look({}, 13.0) == {}
    assert watchdog.look({"t": (2, beat(5, pid=2))}, 30.0) == {}, "it was not running meanwhile"


def test_a_process_has_ten_minutes_to_start_however_short_the_timeout() -> None:
    watchdog = Watchdog(stall_timeout=10)
    watchdog.look({"t": (1, None)}, 0.0)
    assert watchdog.look({"t": (1, None)}, AT_LEAST) == {}
    assert watchdog.look({"t": (1, None)}, AT_LEAST + 1) == {"t": AT_LEAST + 1}


@pytest.mark.parametrize(("seconds_per_step", "bound"), [(0.01, AT_LEAST), (1.0, AT_LEAST), (120.0, STEPS * 120.0)])
def test_by_default_it_may_take_twenty_median_steps_and_at_least_ten_minutes(
    seconds_per_step: float, bound: float
) -> None:
    watchdog, now = Watchdog(), 0.0
    for step in range(30):
        now += 1000.0 if step == 1 else 10 * seconds_per_step  # the first one was compiled
        assert watchdog.look({"t": (1, beat(10 * step))}, now) == {}
    assert watchdog.bound("t") == pytest.approx(bound)
    assert watchdog.look({"t": (1, beat(290))}, now + bound - 1) == {}
    assert watchdog.look({"t": (1, beat(290))}, now + bound + 1) == {"t": pytest.approx(bound + 1)}
