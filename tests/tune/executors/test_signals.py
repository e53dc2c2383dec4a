"""What signals do while trials run."""

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import session_on, write_file
from tune.executors.signals import discard_interrupt, exit_on_signals, interrupt_blocked, stop_on_event, stop_on_signal

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_second_signal_exits_at_once(
    tmp_path: Path,
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    is_terminal: bool,
) -> None:
    codes: list[int] = []
    monkeypatch.setattr("ngpt.system.signals.os._exit", codes.append)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    with session_on(file, tmp_path / "tiny") as session, stop_on_signal(session, owns_process=True):
        signal.raise_signal(signal.SIGINT)
        assert (session.stop_requested, codes) == (True, [])
        signal.raise_signal(signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]
    said = capfd.readouterr().err
    assert "stopped at once; run the same command again to resume" in said
    assert ("\x1b[?25h" in said) is is_terminal, "the live view has hidden the cursor"


def test_a_closed_terminal_may_send_its_signal_twice(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.signals.os._exit", lambda code: pytest.fail(f"ended with {code}"))
    with session_on(file, tmp_path / "tiny") as session, stop_on_signal(session):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert session.stop_signal == signal.SIGHUP


def test_with_nohup_the_run_outlives_its_terminal(tmp_path: Path, file: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with session_on(file, tmp_path / "tiny") as session, stop_on_signal(session):
            signal.raise_signal(signal.SIGHUP)
            assert not session.stop_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_restored_after_the_run(tmp_path: Path, file: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with session_on(file, tmp_path / "tiny") as session:
        with stop_on_signal(session):
            assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] != before
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    ("number", "error"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)],
)
def test_a_second_signal_does_not_end_the_process_of_another_program(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]
) -> None:
    monkeypatch.setattr("ngpt.system.signals.os._exit", lambda code: pytest.fail(f"ended with {code}"))
    with session_on(file, tmp_path / "tiny") as session, pytest.raises(error), stop_on_signal(session):
        signal.raise_signal(number)
        assert session.stop_signal == number
        signal.raise_signal(number)


def test_signals_that_exit_are_given_back(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(SystemExit) as exit, exit_on_signals():
        signal.raise_signal(signal.SIGTERM)
    assert exit.value.code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_handler_that_was_not_set_by_python_stays(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python cannot put the handler of an embedding program back, and shows it as None."""
    changed: list[int] = []
    monkeypatch.setattr("ngpt.system.signals.signal.getsignal", lambda number: None)
    monkeypatch.setattr("ngpt.system.signals.signal.signal", lambda number, handler: changed.append(number))
    with session_on(file, tmp_path / "tiny") as session, stop_on_signal(session), exit_on_signals():
        assert changed == []


def test_an_event_that_another_thread_sets_requests_a_stop(tmp_path: Path, file: Path) -> None:
    with session_on(file, tmp_path / "tiny") as session:
        stopped = threading.Event()
        session.request_stop = stopped.set  # type: ignore[method-assign]
        event = threading.Event()
        with stop_on_event(session, event):
            assert not stopped.is_set()
            event.set()
            assert stopped.wait(60)
        with stop_on_event(session, threading.Event()):  # ends also without a request
            pass


def started(signals: Connection) -> None:
    """Main function of a process: tells which handler of Ctrl-C it has, once it takes signals."""
    discard_interrupt()
    signals.send(signal.getsignal(signal.SIGINT) is signal.default_int_handler)


def test_ctrl_c_while_a_process_starts_neither_ends_it_nor_shows_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=started, args=(theirs,))
    with interrupt_blocked():
        process.start()
    assert process.pid
    os.kill(process.pid, signal.SIGINT)  # it has only begun to import
    process.join()
    assert process.exitcode == 0 and ours.recv() and capfd.readouterr().err == ""
