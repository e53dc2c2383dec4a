"""Times whole campaigns of tiny trials on a private Ray, from their journals."""

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from ngpt.training.throughput import measure_step
from tune.campaign import load_campaign
from tune.launch import launch
from tune.machine.environment import usable_cpus
from tune.spec.schema import Campaign
from tune.storage.journal import read_journal
from tune.storage.summaries import CampaignSummary

Figures = dict[str, Any]

AGENTS = ("ray::Dashboard", "ray::RuntimeEnv")  # processes of Ray that are titled like workers

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
) -> Figures:
    """Measures what a campaign costs besides training steps, from the start of the first trial to the end of the last.

    trials: with about `seconds` of training each, or with `steps` steps. workers: default: the number of cores.
    efficiency: time inside training steps over wall time times workers. The other shares, in the same unit:
    between_share (between the steps of two trials: evaluation, model and optimizer, files, Ray), worker_start_share
    (until the workers begin their first steps), idle_share (workers waiting for the last trial).
    seconds_per_extra_trial: of a worker, outside the steps, for each trial but its first. startup_seconds: from the
    call to the first trial. service_cpu_seconds: processor time of the driver and of Ray's own processes.
    """
    workers = workers or usable_cpus()
    count = steps or steps_of(seconds)
    times = run_tiny(trials, steps=count, workers=workers)
    slots = times["seconds"] * workers
    return {
        "trials": trials,
        "workers": workers,
        "steps_per_trial": count,
        "step_seconds_per_trial": times["step_seconds"] / trials,
        "efficiency": times["step_seconds"] / slots,
        "between_share": times["between_seconds"] / slots,
        "worker_start_share": times["worker_start_seconds"] / slots,
        "idle_share": times["idle_seconds"] / slots,
        "seconds_per_extra_trial": times["between_seconds"] / max(1, trials - workers),
        **{name: times[name] for name in ("startup_seconds", "seconds", "service_cpu_seconds")},
    }


def scaling(
    *, trials: int = 20, seconds: float = 5.0, steps: int | None = None, workers: int = 2, rounds: int = 1
) -> Figures:
    """Measures how much faster `workers` finish a campaign than one worker; each round runs both.

    speedup: of the wall time from the start of the first trial to the end of the last; speedup_with_startup: of the
    whole command; speedup_of_steps: of the tokens per second inside training steps, the limit that the machine sets.
    Each is a ratio of sums over the rounds, since the speed of a shared machine drifts. service_cpu_share: processor
    time of the driver and of Ray's own processes over wall time, with several workers.
    """
    count = steps or steps_of(seconds)
    runs = [run_tiny(trials, steps=count, workers=size) for _ in range(rounds) for size in (1, workers)]
    ones, severals = runs[::2], runs[1::2]

    def total(group: Sequence[Figures], *names: str) -> float:
        return sum(run[name] for run in group for name in names)

    speed, command = "tokens_per_second", ("seconds", "startup_seconds")
    return {
        "trials": trials,
        "steps_per_trial": count,
        "rounds": rounds,
        "workers": workers,
        "one_worker_seconds": total(ones, "seconds") / rounds,
        "several_workers_seconds": total(severals, "seconds") / rounds,
        "speedup": total(ones, "seconds") / total(severals, "seconds"),
        "speedup_with_startup": total(ones, *command) / total(severals, *command),
        "speedup_of_steps": workers * total(severals, speed) / total(ones, speed),
        "tokens_per_second_one_worker": total(ones, speed) / rounds,
        "tokens_per_second_of_each_of_several": total(severals, speed) / rounds,
        "service_cpu_share": total(severals, "service_cpu_seconds") / total(severals, "seconds"),
    }


def steps_of(seconds: float) -> int:
    """The number of steps of the tiny trial that take `seconds` on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        figures = measure_step(tiny_campaign(Path(folder), 2, steps=1, workers=1).base, warmup=20, steps=100)
    torch.set_num_threads(threads)
    return max(1, round(seconds * 1000 / figures["step_ms"]))


def tiny_campaign(folder: Path, trials: int, *, steps: int, workers: int) -> Campaign:
    """A campaign of `trials` trials (rounded down to pairs); its file is written into `folder`."""
    path = folder / "bench.yaml"
    path.write_text(TINY.format(seeds=list(range(1, trials // 2 + 1)), steps=steps, workers=workers))
    return load_campaign(path)


def run_tiny(trials: int, *, steps: int, workers: int) -> Figures:
    """Runs a campaign of tiny trials; returns its times."""
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        return run_timed(tiny_campaign(Path(folder), trials, steps=steps, workers=workers), Path(folder) / "results")[0]


def run_timed(campaign: Campaign, root: Path) -> tuple[Figures, CampaignSummary]:
    """Runs a campaign without a view; returns its times, see `times_of`, and its summary."""
    services = ServiceTime()
    called = time.time()
    summary, _ = launch(campaign, root, command="tune.bench", view=services.view)
    times = times_of(read_journal(root / "journal.jsonl"))
    return times | {"startup_seconds": times.pop("began") - called, "service_cpu_seconds": services.seconds}, summary


def times_of(events: Sequence[Mapping[str, Any]]) -> Figures:
    """Where the time of a campaign went: seconds of all workers together, except `seconds`, the wall time from `began`.

    Step time is the tokens of a trial over its steady speed. A worker is a process; its time between two trials counts
    for the second one.
    """
    ended = [event for event in events if event["event"] == "trial_finished"]
    began, over = min(_time(e) for e in events if e["event"] == "trial_started"), max(map(_time, ended))
    trials_of = defaultdict[int, list[Mapping[str, Any]]](list)
    for event in ended:
        trials_of[event["provenance"]["pid"]].append(event)
    start = between = idle = 0.0
    for own in trials_of.values():
        start += _time(own[0]) - began - _step_seconds(own[0])
        for before, event in pairwise(own):
            between += _time(event) - _time(before) - _step_seconds(event)
        idle += over - _time(own[-1])
    return {
        "began": began,
        "seconds": over - began,
        "step_seconds": sum(map(_step_seconds, ended)),
        "between_seconds": between,
        "worker_start_seconds": start,
        "idle_seconds": idle,
        "tokens_per_second": sum(event["metrics"]["tokens_per_second"] for event in ended) / len(ended),
    }


def _step_seconds(event: Mapping[str, Any]) -> float:
    return event["metrics"]["tokens"] / event["metrics"]["tokens_per_second"]


def _time(event: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


class ServiceTime:
    """Measures the processor seconds of the driver and of Ray's own processes while a campaign runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def view(self, snapshot: Callable[[], Any]) -> Iterator[SimpleNamespace]:
        """A view for `launch` that shows nothing and measures from its start to its end."""
        before = self._used()
        yield SimpleNamespace(message=lambda text: None)
        after = self._used()
        self.seconds = sum(seconds - before.get(process, 0.0) for process, seconds in after.items())

    @staticmethod
    def _used() -> dict[tuple[int, float], float]:
        used = {}
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                name = process.name()  # workers are named after their trial, with the same prefix as Ray's agents
                if not name.startswith("ray::") or name.startswith(AGENTS):
                    times = process.cpu_times()
                    used[process.pid, process.create_time()] = times.user + times.system
        return used
