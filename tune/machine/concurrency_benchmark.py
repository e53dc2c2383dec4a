"""Trials that train at the same time on one device, each in a process of its own, as a campaign's workers do: how many
tokens per second they make together, and what memory each takes.
"""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ngpt.config.base import override
from ngpt.system.memory import is_out_of_memory, peak_memory, reset_peak_memory
from ngpt.system.timing import synchronize
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import benchmark_run
from tune import format as fmt
from tune.machine.environment import total_memory
from tune.trials.trial import describe_machine

SECONDS = 1.5  # of training with each number of trials
FEWEST = 3  # steps in that time
WARMUP = 5  # steps of a new process, after which its memory has its final size
FREE = 0.1  # share of the device's memory that is left to what a calibration does not see
FALLING = 0.95  # of the most tokens per second so far: below it more trials are not tried
PATIENCE = 300.0  # seconds for a process to import torch, to compile and to warm up
MARGIN = 0.2  # seconds from the order to train until all start

Log = Callable[[str], None]


class CalibrationError(Exception):
    """A trial could not be measured; the message says why."""


@dataclass(frozen=True)
class ThroughputPoint:
    """So many trials at once on one device: what they make together, and what each of them takes."""

    trials: int
    threads: int  # of each
    tokens_per_second: float  # of all together
    memory_bytes: int  # of each, on average: what is in use on a GPU over the trials; on a CPU the peak of a process
    room: int  # how many such trials the memory holds, less `FREE`

    @property
    def fits(self) -> bool:
        """Whether the memory has room for this many."""
        return self.trials <= self.room


def describe_device(config: TrainConfig, threads: int) -> str:
    """Host, device and version of torch that a curve holds for."""
    about = describe_machine(config.device, threads)
    return f"{about['host']} {about['device']} torch {about['torch']}"


def measure_concurrent_trials(
    config: TrainConfig,
    *,
    counts: Iterable[int],
    threads: Callable[[int], int],
    seconds: float = SECONDS,
    enough: Callable[[Sequence[ThroughputPoint]], bool] = lambda curve: False,
    log: Log = lambda line: None,
) -> list[ThroughputPoint]:
    """A point for each of `counts`, as far as more trials are faster and fit.

    Args:
        config: whose steps are taken; its corpus must be prepared.
        counts: of trials at once, rising.
        threads: of each trial, by how many there are.
        seconds: of training with each count, after the warm-up.
        enough: asked after each point whether to leave it at that.
        log: gets a line per point.

    Raises:
        CalibrationFailed: not even the first count could be measured.
    """
    curve: list[ThroughputPoint] = []
    tried = list(counts)
    with _team(resolved(config)) as together:
        for count in tried:
            if curve and (count > curve[-1].room or _falls(curve) or enough(curve)):
                break
            # All that may still be needed start at once; but the first alone, since the others find what it compiles.
            members = max(other for other in tried if other <= curve[-1].room) if curve else count
            try:
                curve.append(together(count, members, threads(count), seconds))
            except CalibrationError as error:
                if not curve:
                    raise
                log(f"{count} at once: {error}")
                break
            each, all_of_them = curve[-1].memory_bytes, curve[-1].tokens_per_second
            log(f"{count} at once: {fmt.count(all_of_them)} tokens/s in all, {fmt.size(each)} of memory each")
    return curve


def _falls(curve: Sequence[ThroughputPoint]) -> bool:
    return curve[-1].tokens_per_second < FALLING * max(point.tokens_per_second for point in curve)


@contextmanager
def _team(config: TrainConfig) -> Iterator[Callable[[int, int, int, float], ThroughputPoint]]:
    """A call that trains with the first processes of a team, on so many threads each, for so long.

    The team grows to the size that the call gives, and is kept for the next one.
    """
    members: list[_Member] = []

    def together(count: int, size: int, threads: int, seconds: float) -> ThroughputPoint:
        new = [_Member(config, threads) for _ in range(size - len(members))]
        members.extend(new)
        for member in new:
            member.answer(PATIENCE)
        start = time.monotonic() + MARGIN
        for member in members[:count]:
            member.pipe.send((start, seconds, threads))
        answers = [member.answer(MARGIN + 10 * seconds + PATIENCE) for member in members[:count]]
        in_use = max(answer["in_use"] for answer in answers) // len(members)
        each = max(in_use, *(answer["peak"] for answer in answers))
        return ThroughputPoint(
            trials=count,
            threads=threads,
            tokens_per_second=sum(answer["tokens"] / answer["seconds"] for answer in answers),
            memory_bytes=each,
            room=int(answers[0]["total"] * (1 - FREE) / each),
        )

    try:
        yield together
    finally:
        for member in members:
            member.end()


class _Member:
    """One process with a model that is ready to train."""

    def __init__(self, config: TrainConfig, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(config, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self, patience: float) -> dict[str, Any]:
        """What the process says next.

        Raises:
            CalibrationFailed: it has failed or died, or says nothing for so many seconds.
        """
        if not self.pipe.poll(patience):
            raise CalibrationError(f"no answer for {patience:.0f} s")
        try:
            said = self.pipe.recv()
        except EOFError:
            self._process.join()
            raise CalibrationError(f"its process died (exit code {self._process.exitcode})") from None
        if "error" in said:
            raise CalibrationError(said["error"])
        return said

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(config: TrainConfig, threads: int, pipe: Connection) -> None:
    """The body of a process: prepares a run, and trains whenever it is told to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    try:
        torch.set_num_threads(threads)
        # A smaller batch where memory runs out would be another measurement.
        run = benchmark_run(override(config, {"on_oom": "fail"}))
        for _ in range(WARMUP):
            train_step(run)
        pipe.send({})
        while True:
            start, seconds, threads = pipe.recv()
            torch.set_num_threads(threads)
            reset_peak_memory(run.device)
            time.sleep(max(0.0, start - time.monotonic()))
            steps, begun = 0, time.monotonic()
            while steps < FEWEST or time.monotonic() < begun + seconds:
                train_step(run)
                steps += 1
            synchronize(run.device)
            taken = time.monotonic() - begun
            pipe.send({"tokens": steps * config.tokens_per_step, "seconds": taken, **_memory(run.device)})
    except EOFError:
        return
    except Exception as error:  # told to the parent, which raises it
        last = traceback.format_exception_only(error)[-1].strip()
        pipe.send({"error": "out of memory" if is_out_of_memory(error) else last})


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes: `peak` of this process, `in_use` on a GPU by all processes, and the `total` that there is."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"peak": torch.cuda.max_memory_reserved(device), "in_use": total - free, "total": total}
    return {"peak": peak_memory(device), "in_use": 0, "total": total_memory()}
