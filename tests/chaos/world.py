"""The campaign that the harness disturbs, and the processes that run it.

A run is a fork of a process that has imported everything: the real command on real files, which can be killed like any
other, but takes a third of a second instead of three.
"""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from unittest.mock import patch

from tests.helpers.tiny_campaign import PHASES, write_corpus, write_file

LONG_PHASES = """
  - name: rate
    vary: {lr: [1e-4, 1e-2]}
  - name: projection
    inherit: rate
    grid: {project_every: [1, 3]}
"""
CHECKPOINT = "{every: EVERY, keep_last: 1}"  # there is no older one to fall back on
CANARIES = {"WANDB_API_KEY": "canary0123456789abcdef0123456789abcdef01", "HF_TOKEN": "hf_canaryCanaryCanaryCanary"}
CLEAN = ("WANDB_MODE", "WANDB_PROJECT", "RAY_ADDRESS")


@dataclass(frozen=True)
class Ran:
    """How a run ended; a negative `code` is the signal that killed it."""

    code: int
    err: str
    seconds: float


@dataclass(frozen=True)
class World:
    """A folder with a corpus, its cache, a campaign file, and the results of an undisturbed run."""

    folder: Path
    file: Path
    every: int  # steps between checkpoints
    reference: Path  # results directory

    def command(self, out: Path, *options: str) -> list[str]:
        """Arguments of a run into `out`."""
        return [str(self.file), "--out", str(out), *options]

    def start(self, out: Path, inside: Callable[[], None] | None = None, *, beside: Path | None = None) -> int:
        """Forks a run that calls `inside` first; returns its process id. `beside` names its output files."""
        out.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        code = 1
        try:
            _redirect(beside or out)
            if inside is not None:
                inside()
            import run_campaign

            code = run_campaign.main(self.command(out, "--inline", "--json"))
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # like the interpreter
            traceback.print_exc()
        finally:
            with suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def wait(self, pid: int, out: Path, since: float) -> Ran:
        _, status = os.waitpid(pid, 0)
        err = _stderr(out)
        return Ran(os.waitstatus_to_exitcode(status), err, time.perf_counter() - since)

    def run(self, out: Path, inside: Callable[[], None] | None = None, *, most: float = 600.0) -> Ran:
        """Runs the campaign to its end; a run that hangs is killed and gets code 1."""
        ran = self.run_for(most, out, inside)
        return ran if ran.seconds < most else Ran(1, f"{ran.err}\nthe run hung for {most:.0f} s", ran.seconds)

    def run_for(self, seconds: float, out: Path, inside: Callable[[], None] | None = None) -> Ran:
        """Runs the campaign and kills it after `seconds`, unless it has ended."""
        since = time.perf_counter()
        pid = self.start(out, inside)
        while time.perf_counter() - since < seconds:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                err = _stderr(out)
                return Ran(os.waitstatus_to_exitcode(status), err, time.perf_counter() - since)
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)  # nothing has waited for it, so the id is still its own
        return self.wait(pid, out, since)


def _stderr(out: Path) -> str:
    """The stderr of a run; a run killed at once may not have the file."""
    err = out.with_suffix(".err")
    return err.read_text(errors="replace") if err.exists() else ""


def clear(out: Path) -> None:
    """Removes the results, output and log of a run."""
    shutil.rmtree(out, ignore_errors=True)
    for suffix in (".out", ".err", ".log"):
        out.with_suffix(suffix).unlink(missing_ok=True)


def _redirect(out: Path) -> None:
    """Sends output to files next to `out`, and puts secrets into the environment that must not appear anywhere."""
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        target = os.open(out.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(target, descriptor)
    os.environ.update(CANARIES)
    for name in CLEAN:
        os.environ.pop(name, None)


@contextmanager
def world(
    *, steps: int = 4, every: int = 2, seeds: str = "[1]", phases: str = PHASES, keep: bool = False
) -> Iterator[World]:
    """Makes a world, in memory if possible, runs the campaign once, and removes it afterwards unless `keep`."""
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(prefix="chaos-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        with patch.dict(os.environ, NGPT_CACHE=str(folder / "cache")):
            file = write_file(
                folder,
                write_corpus(folder),
                phases=phases,
                seeds=seeds,
                steps=steps,
                every=every,
                lr="1e-4",
                checkpoint=CHECKPOINT,
                log_every=every,
            )
            made = World(folder, file, every, folder / "reference" / "tiny")
            _warm_up(made)
            ran = made.run(folder / "reference")
            if ran.code:
                raise RuntimeError(f"the undisturbed run ended with {ran.code}:\n{ran.err}")
            yield made
    finally:
        if keep:
            print(f"  the files are in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _warm_up(made: World) -> None:
    """Runs the campaign once in this process, so that forks share all imports and the prepared corpus."""
    import torch

    import run_campaign
    import tune.results.verify

    torch.set_num_threads(1)
    assert tune.results.verify
    previous = signal.getsignal(signal.SIGTERM)
    with open(os.devnull, "w") as nowhere:
        out, err = os.dup(1), os.dup(2)
        try:
            sys.stdout.flush()
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            code = run_campaign.main(made.command(made.folder / "warm", "--inline", "--json"))
            sys.stdout.flush()
        finally:
            os.dup2(out, 1)
            os.dup2(err, 2)
    signal.signal(signal.SIGTERM, previous)
    if code:
        raise RuntimeError(f"the campaign ended with {code}; to see why: {' '.join(made.command(Path('results')))}")
