"""A run that a signal stops saves where it is; resumed, it equals one that nothing has stopped."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ngpt.training.loop
from ngpt.data.dataset import DataConfig
from ngpt.system.heartbeat import HeartbeatWriter, read_heartbeat
from ngpt.train import main
from tests.helpers import ROOT
from tests.helpers.tiny_run import assert_equal_weights, rows, untimed, weights

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


# ---- the command, stopped from outside -----------------------------------------------------------------------------

LAST = 60
# Evaluation and saving take most of the time, so that a signal finds them in progress.
LONG = [f"steps={LAST}", "eval_every=20", "eval_tokens=50000", "checkpoint.every=10", "tracker.log_every=7"]


class Command:
    """`python -m ngpt.train` as a process of its own, with a new cache."""

    def __init__(self, out: Path, *arguments: str) -> None:
        self.out, self.cache = out, out.with_suffix(".cache")
        command = [sys.executable, "-m", "ngpt.train", "--out", str(out), *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NGPT_CACHE": str(self.cache), "PYTHONPATH": str(ROOT)}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        self._err = out.with_suffix(".err")
        with self._err.open("wb") as err:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment)

    def stop(self, number: int, moment: Callable[["Command"], bool]) -> list[str]:
        """Sends a signal once `moment` is true; returns the lines on stderr."""
        while not moment(self):
            assert self._process.poll() is None, f"the run ended before the moment came: {self.lines()}"
            time.sleep(0.001)
        self._process.send_signal(number)
        assert self.code() == 128 + number, self.lines()
        return self.lines()

    def code(self) -> int:
        return self._process.wait(timeout=600)

    def lines(self) -> list[str]:
        return self._err.read_text().splitlines()

    def step(self) -> int:
        """The step that the run takes now; -1 before the first, and after the last."""
        beat = read_heartbeat(self.out)
        return -1 if beat is None else beat.step

    def imports_torch(self) -> bool:
        return "libtorch" in Path(f"/proc/{self._process.pid}/maps").read_text()


def run_states(out: Path) -> Any:
    """What the last checkpoint holds beside the weights, without the times."""
    saved = torch.load(out / "checkpoints" / f"step_{LAST:07d}" / "state.pt", weights_only=True)
    times = ("timed_tokens", "timed_seconds", "seconds", "train_seconds")
    progress = {name: value for name, value in saved["progress"].items() if name not in times}
    return saved | {"progress": progress | {"last_eval": untimed(progress["last_eval"])}}


def differences(one: Any, other: Any, name: str = "state") -> list[str]:
    """The names of all values that differ, in nested dicts and lists of numbers and tensors."""
    if isinstance(one, dict | list | tuple):
        pairs = one.items() if isinstance(one, dict) else enumerate(one)
        if type(one) is not type(other) or len(one) != len(other):
            return [name]
        return [found for key, value in pairs for found in differences(value, other[key], f"{name}.{key}")]
    is_equal = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [] if is_equal else [name]


def assert_equal_runs(stopped: Path, expected: Path) -> None:
    assert rows(stopped) == rows(expected)
    assert_equal_weights(weights(stopped, LAST), weights(expected, LAST))
    assert differences(run_states(stopped), run_states(expected)) == []


@pytest.fixture(scope="module")
def undisturbed(data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a longer run, and its folder."""
    small = ["n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "device=cpu", "batch_size=2", "optim.lr=1e-2"]
    arguments = ["--set", f"corpus={data.corpus}", f"tokenizer={data.tokenizer}", *small, *LONG]
    out = tmp_path_factory.mktemp("undisturbed")
    assert main([*arguments, "--out", str(out)]) == 0
    return arguments, out


def prepares_data(run: Command) -> bool:
    return any(run.cache.glob(".tmp-*/tokenizer.model"))


def has_begun(run: Command) -> bool:
    return run.step() == 0


def evaluates(run: Command) -> bool:
    return run.step() > 0 and run.step() % 20 == 19  # until the evaluation after this step is over


def saves(run: Command) -> bool:
    return any((run.out / "checkpoints").glob(".tmp-*"))


def at_random(seed: int) -> Callable[[Command], bool]:
    step = random.Random(seed).randrange(1, LAST - 20)
    return lambda run: run.step() >= step


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGUSR1, at_random(1)),
        *(
            pytest.param(number, moment, marks=pytest.mark.slow)
            for number, moment in [
                (signal.SIGINT, at_random(2)),
                (signal.SIGTERM, at_random(3)),
                (signal.SIGHUP, at_random(4)),
                (signal.SIGTERM, prepares_data),
                (signal.SIGUSR1, has_begun),
                (signal.SIGHUP, evaluates),
                (signal.SIGINT, saves),
            ]
        ),
    ],
)
def test_the_command_continues_bit_for_bit_wherever_a_signal_stops_it(
    number: int, moment: Callable[[Command], bool], undisturbed: tuple[list[str], Path], tmp_path: Path
) -> None:
    arguments, expected = undisturbed
    run = Command(tmp_path / "stopped", *arguments)
    *before, last = run.stop(number, moment)
    assert last.startswith(f"stopped by {signal.Signals(number).name} at step ")
    assert last.endswith(f"to go on: python -m ngpt.train --resume {run.out}")
    assert all(line.startswith(("warning:", "step ", "training: ", "topics: ")) for line in before), before
    assert main(["--resume", str(run.out)]) == 0
    assert_equal_runs(run.out, expected)


@pytest.mark.slow
def test_a_signal_ends_a_compilation_at_once(undisturbed: tuple[list[str], Path], tmp_path: Path) -> None:
    run = Command(tmp_path / "stopped", *undisturbed[0], "compile=true")
    *_, last = run.stop(signal.SIGTERM, lambda run: any(run.cache.glob("compiled/*/*.cpp")))
    assert last.startswith(f"stopped by SIGTERM at step 0 of {LAST}, nothing to save; to go on: ")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_during_the_imports_ends_the_command_with_one_line(number: int, tmp_path: Path) -> None:
    assert Command(tmp_path / "out").stop(number, Command.imports_torch) == ["interrupted"]
    assert not (tmp_path / "out").exists()
