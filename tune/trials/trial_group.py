"""Trains several trials that share a graph at once in one process (`resources: {vectorise: K}`).

Each trial keeps its own folder, checkpoints and record. `vectorised` in its provenance is the number of trials in its
group; its tokens per second are those of one trial among them.
"""

import contextlib
import itertools
import logging
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field

import torch

from ngpt.ensemble.train import ensemble_incompatibility, graph_settings, train_together
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import free_memory
from ngpt.training.config import TrainConfig
from tune.trials.trial import (
    Attempt,
    TrialResult,
    TrialSpec,
    limit_gpu_memory,
    open_cached_dataset,
    prepare_trial_folder,
    run_trial,
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
            groups.append([first, *itertools.islice(fitting, size - 1)])
            waiting = [index for index in waiting if index not in groups[-1]]
            if not waiting:
                break
    return groups


def run_trials(specs: Sequence[TrialSpec]) -> Trials:
    """Trains all trials at once, each from the newest intact checkpoint in its folder. Never raises.

    Ends when each trial has ended or was stopped: send trial ids in answer to a yield to stop these trials there. If
    all trials fail together, for example without memory, those that are left are trained one after another.
    """
    if len(specs) == 1:
        yield from _run_alone(specs[0])
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
        # Its time is not that of a trial that was alone from the start.
        yield from _run_alone(spec, vectorised=len(specs))


def _train_group(specs: Sequence[TrialSpec], running: dict[int, TrialSpec]) -> Trials:
    """Trains `specs` at once; removes each from `running` when it has ended or was stopped."""
    attempts = [Attempt(spec, vectorised=len(specs)) for spec in specs]
    dataset = open_cached_dataset(specs[0].config.data)
    for spec in specs:
        prepare_trial_folder(spec.folder, spec.config)
    configs, folders = [spec.config for spec in specs], [spec.folder for spec in specs]
    stopped: list[int] | None = None
    with contextlib.closing(train_together(configs, folders, resume="latest", dataset=dataset)) as runs:
        while running:
            updates = Updates()
            for index, event in runs.send(stopped).items():
                attempt, trial_id = attempts[index], specs[index].trial_id
                if isinstance(event, dict):
                    updates.interim[trial_id] = attempt.interim(event, dataset)
                    continue
                is_error = isinstance(event, Exception)
                updates.ended[trial_id] = attempt.failure(event) if is_error else attempt.result(event)
                del running[index]
            to_stop = (yield updates) or ()
            stopped = [index for index, spec in running.items() if spec.trial_id in to_stop]
            for index in stopped:
                del running[index]


def _run_alone(spec: TrialSpec, **marks: int) -> Trials:
    with contextlib.closing(run_trial(spec, **marks)) as run:
        while True:
            try:
                interim = next(run)
            except StopIteration as stop:
                yield Updates(ended={spec.trial_id: stop.value})
                return
            if spec.trial_id in ((yield Updates(interim={spec.trial_id: interim})) or ()):
                return
