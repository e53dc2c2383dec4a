"""Trains several trials that share a graph at once in one process (`resources: {vectorise: K}`).

Each trial keeps its own folder, checkpoints and record. `vectorised` in its provenance is the number of trials in its
group; its tokens per second are those of one trial among them.
"""

import contextlib
import itertools
import logging
import os
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from ngpt.ensemble.train import Event, ensemble_incompatibility, graph_settings, train_together
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import free_memory
from ngpt.training.config import TrainConfig
from ngpt.training.run import RunResult
from tune.trials.trial import (
    TrialResult,
    TrialSpec,
    describe_machine,
    limit_gpu_memory,
    open_cached_dataset,
    partial_metrics,
    prepare_trial_folder,
    run_trial,
    save_error,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Updates:
    """Results since the last yield, by trial id: `interim` of running trials, `ended` of those that have ended."""

    interim: dict[str, TrialResult] = field(default_factory=dict)
    ended: dict[str, TrialResult] = field(default_factory=dict)


Trials = Generator[Updates, Collection[str] | None, None]


def group_size(waiting: int, workers: int, *, max_size: int) -> int:
    """How many of the waiting trials one of `workers` free workers takes, so that each of the others gets as many."""
    return min(max_size, -(-waiting // max(1, workers)))


def expected_groups(configs: Sequence[TrainConfig], *, workers: int, max_size: int) -> list[list[int]]:
    """The groups, as indices into `configs`, that train if all workers always become free at the same time."""
    graphs = [None if ensemble_incompatibility([config]) else repr(graph_settings(config)) for config in configs]
    waiting = list(range(len(configs)))
    groups: list[list[int]] = []
    while waiting:
        for free_workers in range(min(workers, len(waiting)), 0, -1):
            first, size = waiting[0], group_size(len(waiting), free_workers, max_size=max_size)
            fitting = (index for index in waiting[1:] if graphs[first] is not None and graphs[index] == graphs[first])
            group = [first, *itertools.islice(fitting, size - 1)]
            groups.append(group)
            waiting = [index for index in waiting if index not in set(group)]
            if not waiting:
                break
    return groups


def run_trials(specs: Sequence[TrialSpec]) -> Trials:
    """Trains all trials at once, each from the newest intact checkpoint in its folder. Never raises.

    Ends when each trial has ended or was stopped: send trial ids in answer to a yield to stop these trials there. If
    all trials fail together, for example without memory, those that are left are trained one after another.
    """
    if len(specs) == 1:
        yield from _run_alone(specs[0], group_size=1)
        return
    torch.set_num_threads(specs[0].threads)
    device = pick_device(specs[0].config.device)
    running = dict(enumerate(specs))
    try:
        limit_gpu_memory(device, specs[0].packed)
        yield from _train_group(specs, running)
    except Exception:
        # An error in the common step ends all trials; alone, each gets a result of its own.
        names = ", ".join(spec.name for spec in running.values())
        log.warning("%d trials failed together and continue one by one: %s", len(running), names, exc_info=True)
    finally:
        free_memory(device)
    for spec in running.values():
        with contextlib.suppress(OSError):  # its folder may be the cause of the failure
            HeartbeatWriter(spec.folder).close()  # tells the watchdog which process the trial waits in
    for spec in running.values():
        yield from _run_alone(spec, group_size=len(specs))


def _train_group(specs: Sequence[TrialSpec], running: dict[int, TrialSpec]) -> Trials:
    """Trains `specs` at once; removes each from `running` when it has ended or was stopped."""
    results = _GroupResults(specs)
    dataset = open_cached_dataset(specs[0].config.data)
    for spec in specs:
        prepare_trial_folder(spec.folder, spec.config)
    configs, folders = [spec.config for spec in specs], [spec.folder for spec in specs]
    data = {"data_sha256": dataset.manifest["content_sha256"]}
    stopped: list[int] | None = None
    with contextlib.closing(train_together(configs, folders, resume="latest", dataset=dataset)) as runs:
        while running:
            events = runs.send(stopped)
            updates = results.updates(events, data)
            for index, event in events.items():
                if not isinstance(event, dict):
                    del running[index]
            to_stop = (yield updates) or ()
            stopped = [index for index, spec in running.items() if spec.trial_id in to_stop]
            for index in stopped:
                del running[index]


def _run_alone(spec: TrialSpec, *, group_size: int) -> Trials:
    """Runs one trial of a group that started with `group_size` trials."""
    # Its time is not that of a trial that was alone from the start.
    mark = {"vectorised": group_size} if group_size > 1 else {}

    def marked(result: TrialResult) -> TrialResult:
        return replace(result, provenance=result.provenance | mark)

    with contextlib.closing(run_trial(spec)) as run:
        while True:
            try:
                interim = next(run)
            except StopIteration as stop:
                yield Updates(ended={spec.trial_id: marked(stop.value)})
                return
            to_stop = (yield Updates(interim={spec.trial_id: marked(interim)})) or ()
            if spec.trial_id in to_stop:
                return


class _GroupResults:
    """Turns the events of a group's runs into results of trials."""

    def __init__(self, specs: Sequence[TrialSpec]) -> None:
        self._specs = specs
        self._started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._start = time.perf_counter()

    def updates(self, events: Mapping[int, Event], data: Mapping[str, str]) -> Updates:
        """The events as results; `data` is the provenance of a run that has not ended."""
        updates = Updates()
        for index, event in events.items():
            spec = self._specs[index]
            if isinstance(event, RunResult):
                updates.ended[spec.trial_id] = self._result(spec, event)
            elif isinstance(event, Exception):
                error = save_error(spec.folder, event)
                updates.ended[spec.trial_id] = self._result(spec, RunResult("failed", 0), error)
            else:
                interim = RunResult("stopped", 0, partial_metrics(event, spec.config), dict(data))
                updates.interim[spec.trial_id] = self._result(spec, interim)
        return updates

    def _result(self, spec: TrialSpec, run: RunResult, error: str | None = None) -> TrialResult:
        place = {"pid": os.getpid(), "packed": spec.packed, "vectorised": len(self._specs)}
        provenance = run.data | describe_machine(spec.config.device, spec.threads) | place
        seconds = time.perf_counter() - self._start
        return TrialResult(run.status, run.metrics, error, self._started_at, seconds, provenance)
