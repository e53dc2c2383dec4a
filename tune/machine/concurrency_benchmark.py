"""Measures throughput and memory of several trial processes that share one device, like the workers of a campaign."""

import contextlib
import multiprocessing
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import torch

from ngpt.code.plugins import Source, loaded_sources
from ngpt.config.base import override
from ngpt.data.text.progress import Log
from ngpt.ensemble.throughput import steps_together
from ngpt.plugins.load import load_sources
from ngpt.system import gpus
from ngpt.system.memory import is_out_of_memory, peak_memory, reset_peak_memory
from ngpt.system.timing import synchronize
from ngpt.training.config import TrainConfig, resolved
from ngpt.training.evaluation import evaluate_run
from ngpt.training.run import Run
from ngpt.training.saving import save_run
from tune import format as fmt
from tune.machine.environment import total_memory
from tune.machine.spawn import hide_main_module
from tune.trials.trial import tensor_bytes

SECONDS = 1.5  # training time per number of trials
MIN_STEPS = 3  # trained even if that takes longer
WARMUP_STEPS = 5  # of a new process; then the memory of its steps has reached its final size
EVAL_BATCHES = 2  # in the evaluation; more of them need no more memory
RESERVED_MEMORY = 0.1  # share of device memory kept free for peaks that the calibration misses
MIN_SPEED_RATIO = 0.95  # share of the highest throughput so far; below it, larger counts are not measured
ANSWER_TIMEOUT = 300.0  # seconds a process may take to import torch, compile and warm up
START_DELAY = 0.2  # seconds between the command to train and the common start


class CalibrationError(Exception):
    """A trial could not be measured."""


@dataclass(frozen=True)
class ThroughputPoint:
    """Throughput and memory of `trials` concurrent processes on one device, each of which trains a trial or a group."""

    __pydantic_config__: ClassVar = pydantic.ConfigDict(extra="forbid")  # see `CacheRecord` in throughput.py

    trials: int
    threads: int  # of each process
    tokens_per_second: float  # sum over all processes
    memory_bytes: int  # per process: used GPU memory divided by the processes; on a CPU the peak of one process
    room: int  # number of such processes that fit into memory, see `room_for`

    @property
    def fits(self) -> bool:
        """Whether this many trials fit into memory."""
        return self.trials <= self.room


def measure_concurrent_trials(
    config: TrainConfig,
    *,
    counts: Iterable[int],
    threads: Callable[[int], int],
    together: int = 1,
    seconds: float = SECONDS,
    is_enough: Callable[[Sequence[ThroughputPoint]], bool] = lambda curve: False,
    log: Log = lambda line: None,
) -> list[ThroughputPoint]:
    """Measures one point for each of `counts`, which are increasing, until more trials are slower or do not fit.

    The corpus of `config` must be prepared. `threads` maps the number of processes to the threads of each, and each
    trains `together` trials (`vectorise`). Its memory includes that of an evaluation and of a checkpoint. The
    measurement ends early if `is_enough` returns True for the points so far.

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
            new = [_TrialProcess(config, threads(count), together) for _ in range(n_processes - len(processes))]
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
        # Saving takes no GPU memory that depends on the other processes, so it is enough if the first one saves, once.
        process.pipe.send((start_time, seconds, threads, len(processes) == 1))
    timeout = START_DELAY + 10 * seconds + ANSWER_TIMEOUT
    answers = [process.receive(timeout) for process in processes[:count]]
    in_use = max(answer["in_use"] for answer in answers) // len(processes)
    peak = max(answer["peak"] for answer in answers)
    memory_bytes = max(in_use, peak)
    room = room_for(memory_bytes, tensors=peak, total=answers[0]["total"], has_limit=answers[0]["has_limit"])
    speed = sum(answer["tokens"] / answer["seconds"] for answer in answers)
    return ThroughputPoint(count, threads, speed, memory_bytes, room)


def room_for(memory_bytes: int, *, tensors: int, total: int, has_limit: bool) -> int:
    """The number of processes that fit into `total` bytes, with `RESERVED_MEMORY` kept free.

    Each uses `memory_bytes`, of which `tensors` are those of torch. If `has_limit`, the processes of a campaign are
    limited (`tensor_bytes`), and no more fit than the limit lets run.
    """
    room = int(total * (1 - RESERVED_MEMORY) / memory_bytes)
    while has_limit and room > 1 and tensors > tensor_bytes(total, room):
        room -= 1
    return room


class _TrialProcess:
    """A child process that holds the models of a trial or of a group, ready to train."""

    def __init__(self, config: TrainConfig, threads: int, together: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self.pipe, child_pipe = context.Pipe()
        arguments = (config, threads, together, child_pipe, loaded_sources())
        self._process = context.Process(target=_train_on_command, args=arguments, daemon=True)
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


def _train_on_command(
    config: TrainConfig, threads: int, together: int, pipe: Connection, plugins: Sequence[Source]
) -> None:
    """Main function of a child process: sets up its runs, then trains each time the parent sends a command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    try:
        load_sources(plugins)
        torch.set_num_threads(threads)
        eval_tokens = min(config.eval_tokens, EVAL_BATCHES * config.tokens_per_step)
        # Shrinking the batch after running out of memory would change what is measured.
        runs, take_step = steps_together(override(config, {"on_oom": "fail", "eval_tokens": eval_tokens}), together)
        device = runs[0].device
        for _ in range(WARMUP_STEPS):
            take_step()
        pipe.send({})
        while True:
            start_time, seconds, threads, save = pipe.recv()
            torch.set_num_threads(threads)
            reset_peak_memory(device)
            synchronize(device)
            time.sleep(max(0.0, start_time - time.monotonic()))
            steps, started = 0, time.monotonic()
            while steps < MIN_STEPS or time.monotonic() < started + seconds:
                take_step()
                steps += 1
            synchronize(device)
            elapsed = time.monotonic() - started
            _evaluate_and_save(runs[0], save=save)
            tokens = together * steps * config.tokens_per_step
            pipe.send({"tokens": tokens, "seconds": elapsed, **_memory(device)})
    except EOFError:
        return
    except Exception as error:  # sent to the parent, which raises it
        last = traceback.format_exception_only(error)[-1].strip()
        pipe.send({"error": "out of memory" if is_out_of_memory(error) else last})


def _evaluate_and_save(run: Run, *, save: bool) -> None:
    """Evaluates a run as at its end, and saves it, for the memory that this takes. A group does this one by one."""
    evaluate_run(run, last=False)
    evaluate_run(run, last=True)
    if not save:
        return
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory() as folder:  # a full disk is the campaign's problem
        run.out_dir = Path(folder)
        save_run(run)


def _memory(device: torch.device) -> dict[str, Any]:
    """In bytes: the `peak` of this process, the GPU memory `in_use` by all processes, and the device's `total`.

    `has_limit` says whether trials on this device are limited to their share of it.
    """
    if gpus.is_gpu(device):
        free, total = gpus.memory(device)
        return {"peak": gpus.peak_reserved(device), "in_use": total - free, "total": total, "has_limit": True}
    return {"peak": peak_memory(device), "in_use": 0, "total": total_memory(), "has_limit": False}
