"""The body of several trials at once: what `tune/trials/trial.py` is for one, for trials that share a graph.

Each stays a trial of its own: its folder, its checkpoints, its record. What says that it had company is `vectorised` in
the provenance, the number of trials in its batch; its tokens per second are those of one among so many.
"""

import contextlib
import itertools
import logging
import os
import time
import traceback
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import torch

from ngpt.config.secrets import redacted
from ngpt.ensemble.train import Event, ensemble_incompatibility, graph_settings, train_together
from ngpt.system.atomic_files import write_atomic
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import Heartbeat
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
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Updates:
    """What has happened since the last time, by trial id: `interim` as `run_trial` yields, `ended` as it returns."""

    interim: dict[str, TrialResult] = field(default_factory=dict)
    ended: dict[str, TrialResult] = field(default_factory=dict)


Trials = Generator[Updates, Collection[str] | None, None]


def batchable(first: TrialSpec, waiting: Iterable[TrialSpec], *, most: int) -> list[TrialSpec]:
    """`first` and those of the waiting that can be trained with it, in their order, `most` in all."""
    found = [first]
    for spec in waiting:
        if (
            len(found) < most
            and spec.threads == first.threads
            and not ensemble_incompatibility([first.config, spec.config])
        ):
            found.append(spec)
    return found


def group_size(waiting: int, workers: int, *, most: int) -> int:
    """How many of the waiting trials the first of so many workers takes: as many are left for each of the others."""
    return min(most, -(-waiting // max(1, workers)))


def expected_groups(configs: Sequence[TrainConfig], *, workers: int, most: int) -> list[list[int]]:
    """The indices of what would be trained at once, if all workers always became free at the same time."""
    graphs = [None if ensemble_incompatibility([config]) else repr(graph_settings(config)) for config in configs]
    waiting, found = list(range(len(configs))), list[list[int]]()
    while waiting:
        for free in range(min(workers, len(waiting)), 0, -1):
            first, size = waiting[0], group_size(len(waiting), free, most=most)
            fitting = (index for index in waiting[1:] if graphs[first] is not None and graphs[index] == graphs[first])
            found.append([first, *itertools.islice(fitting, size - 1)])
            taken = set(found[-1])
            waiting = [index for index in waiting if index not in taken]
            if not waiting:
                break
    return found


def run_trials(specs: Sequence[TrialSpec]) -> Trials:
    """Trains all at once; yields what there is to say of them, and ends when each has ended or was stopped.

    Trials whose ids are sent in answer to a yield are stopped there. Each continues from the newest intact checkpoint
    in its folder, wherever the others are. It never raises: where all of them fail together, for want of memory say,
    those that are left go on alone, one after another.
    """
    if len(specs) == 1:
        yield from _alone(specs[0])
        return
    torch.set_num_threads(specs[0].threads)
    batch = _Batch(specs)
    under_way = dict(enumerate(specs))
    try:
        limit_gpu_memory(pick_device(specs[0].config.device), specs[0].packed)
        dataset = open_cached_dataset(specs[0].config.data)
        for spec in specs:
            prepare_trial_folder(spec.folder, spec.config)
        runs = train_together([s.config for s in specs], [s.folder for s in specs], resume="latest", dataset=dataset)
        about = {"data_sha256": dataset.manifest["content_sha256"]}
        with contextlib.closing(runs):
            stopped: list[int] | None = None
            while under_way:
                events = runs.send(stopped)
                news = batch.news(events, about)
                for index in [i for i, event in events.items() if not isinstance(event, dict)]:
                    del under_way[index]
                unwanted = (yield news) or ()
                stopped = [index for index, spec in under_way.items() if spec.trial_id in unwanted]
                for index in stopped:
                    del under_way[index]
    except Exception:
        # What fails here has failed for all. Each says for itself what becomes of it when it is alone.
        names = ", ".join(spec.name for spec in under_way.values())
        log.warning("%d trials at once have failed, now one by one: %s", len(under_way), names, exc_info=True)
    finally:
        free_memory(pick_device(specs[0].config.device))
    for spec in under_way.values():
        with contextlib.suppress(OSError):  # its folder may be what has failed
            Heartbeat(spec.folder).close()  # whoever watches sees which process it waits in
    for spec in under_way.values():
        yield from _alone(spec, began_with=len(specs))


def _alone(spec: TrialSpec, *, began_with: int = 1) -> Trials:
    company = {"vectorised": began_with} if began_with > 1 else {}  # its time is not that of a trial by itself

    def marked(result: TrialResult) -> TrialResult:
        return replace(result, provenance=result.provenance | company)

    with contextlib.closing(run_trial(spec)) as run:
        while True:
            try:
                interim = next(run)
            except StopIteration as stop:
                yield Updates(ended={spec.trial_id: marked(stop.value)})
                return
            if spec.trial_id in ((yield Updates(interim={spec.trial_id: marked(interim)})) or ()):
                return


class _Batch:
    """Trials that began together, and what is said of each."""

    def __init__(self, specs: Sequence[TrialSpec]) -> None:
        self._specs = specs
        self._started_at, self._start = datetime.now(UTC).isoformat(timespec="milliseconds"), time.perf_counter()

    def news(self, events: Mapping[int, Event], about: Mapping[str, str]) -> Updates:
        """The events of runs as results of trials; `about` is the provenance of a run that has not ended."""
        news = Updates()
        for index, event in events.items():
            spec = self._specs[index]
            if isinstance(event, RunResult):
                news.ended[spec.trial_id] = self._result(spec, event)
            elif isinstance(event, Exception):
                news.ended[spec.trial_id] = self._failed(spec, event)
            else:
                interim = RunResult("stopped", 0, partial_metrics(event, spec.config), dict(about))
                news.interim[spec.trial_id] = self._result(spec, interim)
        return news

    def _result(self, spec: TrialSpec, run: RunResult, error: str | None = None) -> TrialResult:
        place = {"pid": os.getpid(), "packed": spec.packed, "vectorised": len(self._specs)}
        provenance = run.data | describe_machine(spec.config.device, spec.threads) | place
        seconds = time.perf_counter() - self._start
        return TrialResult(run.status, run.metrics, error, self._started_at, seconds, provenance)

    def _failed(self, spec: TrialSpec, exception: Exception) -> TrialResult:
        text = redacted("".join(traceback.format_exception(exception)))
        with contextlib.suppress(OSError):  # the disk may be full; the record has it, too
            write_atomic(spec.folder / "error.txt", text)
        return self._result(spec, RunResult("failed", 0), error=text[-4000:])
