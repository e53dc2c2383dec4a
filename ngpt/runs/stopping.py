"""What a signal does to a single run: it saves at the next step, or ends at once if there is nothing to save."""

import contextlib
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

from ngpt.system.heartbeat import read_heartbeat, request_stop
from ngpt.system.signals import call_on_signal, exit_at_once
from ngpt.training.checkpoint import checkpoint_folders


class Stopped(KeyboardInterrupt):
    """A signal has ended a run that has trained no step since it started or resumed."""


class StopRequest:
    """Remembers the signal that ends the run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._step: int | None = None  # at the signal, or at the end of the run; None before the training
        self.signal = 0

    @property
    def exit_code(self) -> int:
        """128 and the number of the signal, as shells have it."""
        return 128 + self.signal

    @contextlib.contextmanager
    def on_signal(self) -> Iterator[None]:
        """Handles signals in the `with` block."""
        with call_on_signal(self._stop, lambda number: exit_at_once(number, "stopped at once")):
            yield

    def _stop(self, number: int) -> None:
        """Asks the run to save; or raises `Stopped`, also out of a compilation, if nothing has been trained yet."""
        self.signal = number
        with contextlib.suppress(OSError):  # no folder yet, or a full disk
            request_stop(self._folder)  # also before raising: Python drops an exception that is raised in a destructor
        beat = read_heartbeat(self._folder)
        self._step = beat and beat.step
        if beat is None or beat.step == beat.began:
            raise Stopped

    def note_step(self, evaluated: int) -> None:
        """Remembers the current step, before the run ends and removes its heartbeat; `evaluated` is the last eval's."""
        beat = read_heartbeat(self._folder)
        self._step = max(beat.step if beat else 0, evaluated)  # an evaluation comes before the heartbeat of its step

    def sentence(self, steps: int) -> str:
        """Says what is saved, and how to go on."""
        name = signal.Signals(self.signal).name
        resume = f"python -m ngpt.train --resume {shlex.quote(str(self._folder))}"
        saved = [int(path.name.removeprefix("step_")) for path in checkpoint_folders(self._folder / "checkpoints")]
        newest = max(saved, default=0)
        step = newest if self._step is None else self._step
        state = "saved" if 0 < step <= newest else f"saved at step {newest}" if saved else "nothing to save"
        return f"stopped by {name} at step {step} of {steps}, {state}; to go on: {resume}"
