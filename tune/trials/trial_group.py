"""Trains several trials with the same graph concurrently in one process (`resources: {vectorise: K}`).

Each trial keeps its own folder, checkpoints and record. `vectorised` in its provenance is the size of its group; its
tokens per second are its own, not those of the whole group.
"""

import contextlib
import itertools
import logging
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ngpt.config.base import printable
from ngpt.config.secrets import redact
from ngpt.ensemble.train import ensemble_incompatibility, graph_settings, train_together
from ngpt.system import gpus
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import HeartbeatWriter
from ngpt.system.memory import free_memory
from ngpt.training.config import TrainConfig
from tune.trials.trial import (
    Attempt,
    TrialResult,
    TrialSpec,
    limit_gpu_memory,
    open_trial_dataset,
    plugin_problem,
    prepare_trial_folder,
    run_trial,
)

log = logging.getLogger(__name__)


class GpuUnusable(Exception):
    """An error of one trial has left the GPU unusable for this process, so the other trials need another one."""


@dataclass(frozen=True)
class Updates:
    """Results since the last yield, by trial id: `interim` for running trials, `ended` for trials that have ended.

    `files` has what the run does not see of the files of these trials, since they train in a folder of another host.
    """

    interim: dict[str, TrialResult] = field(default_factory=dict)
    ended: dict[str, TrialResult] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)  # tune/remote/parts.py


Trials = Generator[Updates, Collection[str] | None, None]


def group_size(waiting: int, workers: int, *, max_size: int) -> int:
    """The number of trials that one worker takes when `workers` free workers share the waiting trials evenly."""
    return min(max_size, -(-waiting // max(1, workers)))


def expected_groups(configs: Sequence[TrainConfig], *, workers: int, max_size: int) -> list[list[int]]:
    """Predicts the groups, as indices into `configs`, assuming that all workers always become free simultaneously."""
    graphs = [None if ensemble_incompatibility([config]) else repr(graph_settings(config)) for config in configs]
    waiting = list(range(len(configs)))
    groups: list[list[int]] = []
    while waiting:
        for free_workers in range(min(workers, len(waiting)), 0, -1):
            first, size = waiting[0], group_size(len(waiting), free_workers, max_size=max_size)
            same_graph = (i for i in waiting[1:] if graphs[first] is not None and graphs[i] == graphs[first])
            groups.append([first, *itertools.islice(same_graph, size - 1)])
            waiting = [index for index in waiting if index not in groups[-1]]
            if not waiting:
                break
    return groups


def run_trials(specs: Sequence[TrialSpec]) -> Trials:
    """Trains all trials concurrently, each from the newest intact checkpoint in its folder.

    Ends when every trial has ended or was stopped. To stop trials, send their ids in response to a yield. If an error,
    such as running out of memory, ends the whole group, the remaining trials are trained sequentially.

    Raises:
        GpuUnusable: after an error of one trial, this process cannot train the remaining ones.
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
    except Exception as error:
        # An error in the shared step ends all trials; when they run alone, each gets its own result.
        names = ", ".join(spec.name for spec in running.values())
        reason = printable(redact(f"{type(error).__name__}: {error}"))
        text = "%d trials failed together and continue one by one: %s (%s)"
        # A rule of a plug-in may branch on the values of a tensor, which is no fault of ours to trace.
        log.warning(text, len(running), names, reason, exc_info=not specs[0].plugins)
    finally:
        with contextlib.suppress(RuntimeError):  # of a GPU that has become unusable
            free_memory(device)
    for spec in running.values():
        with contextlib.suppress(OSError):  # the folder may have caused the failure
            HeartbeatWriter(spec.folder).close()  # tells the watchdog which process the trial belongs to
    for spec in running.values():
        if not gpus.is_usable():
            raise GpuUnusable("an error has left the GPU unusable for this process")
        # `vectorised` marks its time as not comparable with that of a trial that always ran alone.
        yield from _run_alone(spec, vectorised=len(specs))


def _train_group(specs: Sequence[TrialSpec], running: dict[int, TrialSpec]) -> Trials:
    """Trains `specs` concurrently; removes each from `running` when it has ended or was stopped."""
    if problem := plugin_problem(specs[0].plugins):
        raise problem
    attempts = [Attempt(spec, vectorised=len(specs)) for spec in specs]
    dataset = open_trial_dataset(specs[0])
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
