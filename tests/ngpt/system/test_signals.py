"""Which signals stop a run, and which of them insist."""

import signal
from collections.abc import Iterator

import pytest

from ngpt.system import signals
from ngpt.system.signals import HANGUP, call_on_signal, stop_signals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ALL}
    for number in ALL:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("sent", "insists"),
    [
        ([signal.SIGINT, signal.SIGINT], [signal.SIGINT]),
        ([signal.SIGINT, signal.SIGTERM], [signal.SIGTERM]),
        ([signal.SIGHUP, signal.SIGHUP], []),
        ([signal.SIGHUP, signal.SIGINT], [signal.SIGINT]),
        ([signal.SIGUSR1, signal.SIGTERM], []),  # Slurm announces the end of a job, and then terminates it
        ([signal.SIGUSR2, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT], [signal.SIGINT]),
        ([signal.SIGTERM, signal.SIGUSR1], []),
    ],
)
def test_a_later_signal_insists_unless_it_follows_by_itself(sent: list[int], insists: list[int]) -> None:
    first: list[int] = []
    later: list[int] = []
    with call_on_signal(first.append, later.append):
        for number in sent:
            signal.raise_signal(number)
    assert (first, later) == (sent[:1], insists)


def test_the_handlers_of_before_are_restored() -> None:
    with call_on_signal(lambda number: None, lambda number: None):
        assert all(signal.getsignal(number) != signal.SIG_DFL for number in ALL)
    assert all(signal.getsignal(number) == signal.SIG_DFL for number in ALL)


@pytest.mark.parametrize("number", ALL)
def test_a_signal_calls_the_innermost_of_two_blocks(number: int) -> None:
    """The command sets handlers for its start, and others while it trains."""
    outer: list[int] = []
    inner: list[int] = []
    with call_on_signal(outer.append, pytest.fail):
        with call_on_signal(inner.append, pytest.fail):
            signal.raise_signal(number)
        assert (outer, inner) == ([], [number])
        signal.raise_signal(number)
    assert (outer, inner) == ([number], [number])


def test_a_signal_that_means_something_else_already_keeps_its_meaning() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
    signal.signal(signal.SIGUSR1, lambda *_: None)  # such as a profiler's
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2]


def test_without_the_signals_of_unix_the_others_still_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HANGUP == signal.SIGHUP
    monkeypatch.setattr(signals, "HANGUP", None)
    monkeypatch.setattr(signals, "WARNINGS", ())
    assert stop_signals() == [signal.SIGINT, signal.SIGTERM]
