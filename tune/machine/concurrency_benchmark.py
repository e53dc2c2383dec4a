"""Measures throughput and memory of several trial processes that share one device, like the workers of a campaign."""

import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from ngpt.config.base import override
from ngpt.data.text.progress import Log
from ngpt.system import gpus
from ngpt.system.memory import is_out_of_memory, peak_memory, reset_peak_memory
from ngpt.system.timing import synchronize
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.loop import train_step
from ngpt.training.throughput import benchmark_run
from tune import format as fmt
from tune.machine.environment import total_memory
from tune.machine.spawn import hide_main_module

SECONDS = 1.5  # training time per number of trials
MIN_STEPS = 3  # trained even if that takes longer
WARMUP_STEPS = 5  # of a new process; then its memory has reached its final size
RESERVED_MEMORY = 0.1  # share of device memory kept free for peaks that the calibration misses
MIN_SPEED_RATIO = 0.95  # share of the highest throughput so far; below it, larger counts are not measured
ANSWER_TIMEOUT = 300.0  # seconds a process may take to import torch, compile and warm up
START_DELAY = 0.2  # seconds between the command to train and the common start


class CalibrationError(Exception):
    """A trial could not be measured."""


@dataclass(frozen=True)
class ThroughputPoint:
    """Throughput and memory of `trials` concurrent trials on one device."""

    trials: int
    threads: int  # of each trial
    tokens_per_second: float  # sum over all trials
    memory_bytes: int  # per trial: used GPU memory divided by the trials; on a CPU the peak of one process
    room: int  # number of such trials that fit into memory, with `RESERVED_MEMORY` kept free

    @property
    def fits(self) -> bool:
        """Whether this many trials fit into memory."""
        return self.trials <= self.room


def measure_concurrent_trials(
    config: TrainConfig,
    *,
    counts: Iterable[int],
    threads: Callable[[int], int],
    seconds: float = SECONDS,
    is_enough: Callable[[Sequence[ThroughputPoint]], bool] = lambda curve: False,
    log: Log = lambda line: None,
) -> list[ThroughputPoint]:
    """Measures one point for each of `counts`, which are increasing, until more trials are slower or do not fit.

    The corpus of `config` must be prepared. `threads` maps the number of trials to the threads of each. The measurement
    ends early if `is_enough` returns True for the points so far.

    Raises:
        CalibrationError: the first point could not be measured.
    """
    curve: list[ThroughputPoint] = []
    counts, config = list(counts), resolved(config)
    processes: list[_TrialProcess] = []
    with ExitStack() as stack:
        for count in counts:
            min_speed = MIN_SPEED_RATIO * max((point.tokens_per_second for point in curve), default=0.0)
            if curve and (count > curve[-1].room or curve[-1].tokens_per_second < min_speed or is_enough(curve)):
                break
            # The first process starts alone to fill the compile cache; then all others start at once.
            n_processes = max(other for other in counts if other <= curve[-1].room) if curve else count
            new = [_TrialProcess(config, threads(count)) for _ in range(n_processes - len(processes))]
            processes += new
            for process in new:
                stack.callback(process.kill)
            try:
                for process in new:
                    process.receive(ANSWER_TIMEOUT)
                point = _measure(processes, count, threads(count), seconds)
            except CalibrationError as error:
                if not curve:
                    raise
                log(f"{count} concurrent: {error}")
                break
            curve.append(point)
            speed, memory = fmt.count(point.tokens_per_second), fmt.size(point.memory_bytes)
            log(f"{count} concurrent: {speed} tokens/s in total, {memory} of memory each")
    return curve


def _measure(processes: list["_TrialProcess"], count: int, threads: int, seconds: float) -> ThroughputPoint:
    """Measures training in the first `count` processes."""
    start_time = time.monotonic() + START_DELAY
    for process in processes[:count]:
        process.pipe.send((start_time, seconds, threads))
    timeout = START_DELAY + 10 * seconds + ANSWER_TIMEOUT
    answers = [process.receive(timeout) for process in processes[:count]]
    in_use = max(answer["in_use"] for answer in answers) // len(processes)
    memory_bytes = max(in_use, *(answer["peak"] for answer in answers))
    room = int(answers[0]["total"] * (1 - RESERVED_MEMORY) / memory_bytes)
    speed = sum(answer["tokens"] / answer["seconds"] for answer in answers)
    return ThroughputPoint(count, threads, speed, memory_bytes, room)


class _TrialProcess:
    """A child process that holds a model ready to train."""

    def __init__(self, config: TrainConfig, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_train_on_command, args=(config, threads, child_pipe), daemon=True)
        with hide_main_module():
            self._process.start()
        child_pipe.close()

    def receive(self, timeout: float) -> dict[str, Any]:
        """Waits for the next answer. Raises CalibrationError if the process fails, dies or needs over `timeout` s."""
        if not self.pipe.poll(timeout):
            raise CalibrationError(f"no answer for {timeout:.0f} s")
        try:
            answer = self.pipe.recv()
        except EOFError:
            self._process.join()
            raise CalibrationError(f"its process died (exit code {self._process.exitcode})") from None
        if "error" in answer:
            raise CalibrationError(answer["error"])
        return answer

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _train_on_command(config: TrainConfig, threads: int, pipe: Connection) -> None:
    """Main function of a child process: sets up a run, then trains each time the parent sends a command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    try:
        torch.set_num_threads(threads)
        # Shrinking the batch after running out of memory would change what is measured.
        run = benchmark_run(override(config, {"on_oom": "fail"}))
        for _ in range(WARMUP_STEPS):
            train_step(run)
        pipe.send({})
        while True:
            start_time, seconds, threads = pipe.recv()
            torch.set_num_threads(threads)
            reset_peak_memory(run.device)
            time.sleep(max(0.0, start_time - time.monotonic()))
            steps, started = 0, time.monotonic()
            while steps < MIN_STEPS or time.monotonic() < started + seconds:
                train_step(run)
                steps += 1
            synchronize(run.device)
            elapsed = time.monotonic() - started
            pipe.send({"tokens": steps * config.tokens_per_step, "seconds": elapsed, **_memory(run.device)})
    except EOFError:
        return
    except Exception as error:  # sent to the parent, which raises it
        last = traceback.format_exception_only(error)[-1].strip()
        pipe.send({"error": "out of memory" if is_out_of_memory(error) else last})


def _memory(device: torch.device) -> dict[str, int]:
    """In bytes: the `peak` of this process, the GPU memory `in_use` by all processes, and the device's `total`."""
    if gpus.is_gpu(device):
        free, total = gpus.memory(device)
        return {"peak": gpus.peak_reserved(device), "in_use": total - free, "total": total}
    return {"peak": peak_memory(device), "in_use": 0, "total": total_memory()}
