"""Runs whole campaigns of tiny trials on a private Ray and times them from their journals."""

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from ngpt.data.text.progress import Log
from ngpt.system.cgroups import usable_cpus
from ngpt.training.throughput import measure_step
from tune.campaign import load_campaign
from tune.launch import launch
from tune.spec.schema import Campaign
from tune.storage.journal import read_journal
from tune.storage.summaries import CampaignSummary

Metrics = dict[str, Any]

AGENT_TITLES = ("ray::Dashboard", "ray::RuntimeEnv")  # Ray's own processes with titles like those of workers

TINY = """
campaign: bench
seeds: {seeds}
base:
  model: {{n_layer: 2, n_head: 2, n_embd: 64, block_size: 64, mlp: relu2}}
  data: {{corpus: python-docs, tokenizer: "sentencepiece:1024"}}
  batch_size: 16
  steps: {steps}
  eval_every: {steps}
  eval_tokens: 1024
resources: {{cpus_per_trial: 1, workers: {workers}}}
vary: {{alpha: [0.05, 0.1]}}
"""


def campaign(
    *, trials: int = 100, seconds: float = 5.0, steps: int | None = None, workers: int | None = None
) -> Metrics:
    """Measures the overhead of a campaign, from the start of its first trial to the end of its last.

    Each of the `trials` trains for about `seconds`, or for `steps` steps. The default for workers is the number of
    cores. Worker time is wall time times workers. efficiency: share of worker time spent in training steps; the other
    shares are between_share (between the steps of two trials: evaluation, model and optimizer setup, files, Ray),
    worker_start_share (before a worker's first step) and idle_share (waiting for the last trial).
    seconds_per_extra_trial: worker time outside steps for each trial but a worker's first. startup_seconds: time from
    the call to the first trial. service_cpu_seconds: CPU time of the driver and of Ray's own processes.
    """
    workers = workers or usable_cpus()
    steps = steps or steps_within(seconds)
    times = run_tiny(trials, steps=steps, workers=workers)
    worker_seconds = times["seconds"] * workers
    return {
        "trials": trials,
        "workers": workers,
        "steps_per_trial": steps,
        "step_seconds_per_trial": times["step_seconds"] / trials,
        "efficiency": times["step_seconds"] / worker_seconds,
        "between_share": times["between_seconds"] / worker_seconds,
        "worker_start_share": times["worker_start_seconds"] / worker_seconds,
        "idle_share": times["idle_seconds"] / worker_seconds,
        "seconds_per_extra_trial": times["between_seconds"] / max(1, trials - workers),
        **{name: times[name] for name in ("startup_seconds", "seconds", "service_cpu_seconds")},
    }


def scaling(
    *, trials: int = 20, seconds: float = 5.0, steps: int | None = None, workers: int = 2, rounds: int = 1
) -> Metrics:
    """Measures how much faster several workers finish a campaign than one worker; each round runs both.

    Each of the `trials` trains for about `seconds`, or for `steps` steps. speedup: ratio of the wall times from the
    start of the first trial to the end of the last. speedup_with_startup: ratio of the wall times of the whole command.
    speedup_of_steps: ratio of the tokens per second of all workers in training steps, which is the speedup that this
    machine would allow without overhead. All are ratios of sums over the rounds, since the speed of a shared machine
    drifts. service_cpu_share: CPU time of the driver and of Ray's own processes over wall time, with several workers.
    """
    steps = steps or steps_within(seconds)
    runs = [run_tiny(trials, steps=steps, workers=size) for _ in range(rounds) for size in (1, workers)]
    single, parallel = runs[::2], runs[1::2]

    def total(runs: Sequence[Metrics], *names: str) -> float:
        return sum(run[name] for run in runs for name in names)

    speed, command = "tokens_per_second", ("seconds", "startup_seconds")
    return {
        "trials": trials,
        "steps_per_trial": steps,
        "rounds": rounds,
        "workers": workers,
        "one_worker_seconds": total(single, "seconds") / rounds,
        "several_workers_seconds": total(parallel, "seconds") / rounds,
        "speedup": total(single, "seconds") / total(parallel, "seconds"),
        "speedup_with_startup": total(single, *command) / total(parallel, *command),
        "speedup_of_steps": workers * total(parallel, speed) / total(single, speed),
        "tokens_per_second_one_worker": total(single, speed) / rounds,
        "tokens_per_second_of_each_of_several": total(parallel, speed) / rounds,
        "service_cpu_share": total(parallel, "service_cpu_seconds") / total(parallel, "seconds"),
    }


def steps_within(seconds: float) -> int:
    """Returns how many steps of a tiny trial take about `seconds` on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics = measure_step(tiny_campaign(2, steps=1, workers=1).base, warmup=20, steps=100)
    torch.set_num_threads(threads)
    return max(1, round(seconds * 1000 / metrics["step_ms"]))


def tiny_campaign(trials: int, *, steps: int, workers: int) -> Campaign:
    """Returns a campaign of `trials` trials, rounded down to an even number."""
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        path = Path(folder, "bench.yaml")
        path.write_text(TINY.format(seeds=list(range(1, trials // 2 + 1)), steps=steps, workers=workers))
        return load_campaign(path)


def run_tiny(trials: int, *, steps: int, workers: int) -> Metrics:
    """Runs a campaign of tiny trials and returns its times, as `run_timed` does."""
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        return run_timed(tiny_campaign(trials, steps=steps, workers=workers), Path(folder, "results"))[0]


def run_timed(campaign: Campaign, root: Path) -> tuple[Metrics, CampaignSummary]:
    """Runs a campaign without a live view; returns its times (those of `times_of` and two more) and its summary."""
    service_seconds = 0.0

    @contextlib.contextmanager
    def view(snapshot: object) -> Iterator[Log]:
        nonlocal service_seconds
        before = service_cpu_seconds()
        yield lambda text: None
        service_seconds = sum(now - before.get(process, 0.0) for process, now in service_cpu_seconds().items())

    call_time = time.time()
    summary, _ = launch(campaign, root, command="tune.bench", view=view)
    times = times_of(read_journal(root / "journal.jsonl"))
    return times | {"startup_seconds": times.pop("began") - call_time, "service_cpu_seconds": service_seconds}, summary


def times_of(events: Sequence[Mapping[str, Any]]) -> Metrics:
    """Splits the time of a campaign into parts, each summed over all worker processes; `seconds` is the wall time.

    `began` is the time of the first trial's start. The step time of a trial is its token count divided by its
    `tokens_per_second`.
    """
    finished = [event for event in events if event["event"] == "trial_finished"]
    began, ended = min(_time(e) for e in events if e["event"] == "trial_started"), max(map(_time, finished))
    by_worker = defaultdict[int, list[Mapping[str, Any]]](list)
    for event in finished:
        by_worker[event["provenance"]["pid"]].append(event)
    worker_start = between = idle = 0.0
    for trials in by_worker.values():
        worker_start += _time(trials[0]) - began - _step_seconds(trials[0])
        for previous, event in pairwise(trials):
            between += _time(event) - _time(previous) - _step_seconds(event)
        idle += ended - _time(trials[-1])
    return {
        "began": began,
        "seconds": ended - began,
        "step_seconds": sum(map(_step_seconds, finished)),
        "between_seconds": between,
        "worker_start_seconds": worker_start,
        "idle_seconds": idle,
        "tokens_per_second": sum(event["metrics"]["tokens_per_second"] for event in finished) / len(finished),
    }


def _step_seconds(event: Mapping[str, Any]) -> float:
    return event["metrics"]["tokens"] / event["metrics"]["tokens_per_second"]


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def service_cpu_seconds() -> dict[tuple[int, float], float]:
    """Returns the CPU seconds so far of the driver and each of Ray's own processes, by process id and start time."""
    cpu_seconds = {}
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # the process has just ended
            name = process.name()  # the title of a worker names its trial after `ray::`
            if not name.startswith("ray::") or name.startswith(AGENT_TITLES):
                times = process.cpu_times()
                cpu_seconds[process.pid, process.create_time()] = times.user + times.system
    return cpu_seconds
