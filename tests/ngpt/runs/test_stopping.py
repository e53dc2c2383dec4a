"""A run that a signal stops saves where it is; resumed, it equals one that nothing has stopped."""

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ngpt.training.loop
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.train import main
from tests.helpers.tiny_run import assert_equal_weights, rows, weights

pytestmark = pytest.mark.usefixtures("signals")

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138}
STEPS = ["steps=8", "checkpoint.every=5", "tracker.log_every=1"]


@pytest.fixture
def expected(settings_file: Path, tmp_path: Path) -> Path:
    """An undisturbed run."""
    out = tmp_path / "expected"
    assert main(["--config", str(settings_file), "--set", *STEPS, "--out", str(out)]) == 0
    return out


def at_step(number: int, send: Callable[[], object]) -> Callable[..., Any]:
    """Returns a replacement of `train_step` that calls `send` in the step that has this number, counted from 1."""
    real, count = ngpt.training.loop.train_step, 0

    def step(run: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            send()
        return real(run)

    return step


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_a_stopped_run_saves_and_continues_bit_for_bit(
    number: int,
    code: int,
    settings_file: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, step = tmp_path / "stopped", random.Random(number).randint(2, 7)
    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)  # so that the next step is exactly known
    with monkeypatch.context() as patch:
        patch.setattr(ngpt.training.loop, "train_step", at_step(step, lambda: signal.raise_signal(number)))
        assert main(["--config", str(settings_file), "--set", *STEPS, "--out", str(out)]) == code
    name, command = signal.Signals(number).name, f"python -m ngpt.train --resume {out}"
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"stopped by {name} at step {step} of 8, saved; to go on: {command}"
    assert not (out / "stop").exists() and not (out / "heartbeat").exists()
    assert main(["--resume", str(out)]) == 0
    assert f"continuing {out} at step {step} of 8" in capsys.readouterr().err
    assert rows(out) == rows(expected)
    assert_equal_weights(weights(out), weights(expected))


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_has_trained_nothing_yet_stops_at_once(
    is_resumed: bool,
    settings_file: Path,
    expected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first step may compile for minutes."""
    out = tmp_path / "stopped"
    arguments = ["--config", str(settings_file), "--set", *STEPS, "--out", str(out), "--resume", "latest"]

    def never_returns(run: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal did not end the first step")

    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)
    with monkeypatch.context() as patch:
        if is_resumed:
            patch.setattr(ngpt.training.loop, "train_step", at_step(6, lambda: signal.raise_signal(signal.SIGINT)))
            assert main(arguments) == 130
        patch.setattr(ngpt.training.loop, "train_step", never_returns)
        assert main(arguments) == 143
    *_, last = capsys.readouterr().err.splitlines()
    state = "step 6 of 8, saved" if is_resumed else "step 0 of 8, nothing to save"
    assert last.startswith(f"stopped by SIGTERM at {state}; to go on:")
    assert main(["--resume", str(out)]) == 0
    assert rows(out) == rows(expected)
    assert_equal_weights(weights(out), weights(expected))


def test_a_signal_while_the_data_are_prepared_leaves_a_run_that_starts_later(
    settings_file: Path, expected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(ngpt.training.loop, "set_up", lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
        assert main(["--config", str(settings_file), "--set", *STEPS, "--out", str(out)]) == 138
    assert main(["--resume", str(out)]) == 0
    assert_equal_weights(weights(out), weights(expected))


def test_the_line_says_what_is_lost_if_the_last_save_fails(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real = tmp_path / "out", ngpt.training.saving.save_checkpoint

    def save(*arguments: Any, step: int, **named: Any) -> Path:
        if step == 7:
            raise OSError(28, "No space left on device")
        return real(*arguments, step=step, **named)

    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)
    monkeypatch.setattr("ngpt.training.saving.save_checkpoint", save)
    monkeypatch.setattr(ngpt.training.loop, "train_step", at_step(7, lambda: signal.raise_signal(signal.SIGHUP)))
    assert main(["--config", str(settings_file), "--set", *STEPS, "--out", str(out)]) == 129
    assert "stopped by SIGHUP at step 7 of 8, saved at step 5; to go on:" in capsys.readouterr().err


def test_a_run_that_cannot_write_its_heartbeat_finishes(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HeartbeatWriter, "beat", lambda self, step: None)  # no heartbeat, as on a full disk
    arguments = ["--config", str(settings_file), "--set", *STEPS, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert '"finished"' in capsys.readouterr().out
