"""A Ray Tune worker process that trains trials, or groups of trials, one after another without a restart."""

import contextlib
import errno
import logging
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import ray._private.worker
import ray.tune
from ray.util.metrics import Gauge

from ngpt.config.base import ConfigError
from ngpt.distributed.network import LOOPBACK
from ngpt.system import gpus
from ngpt.system.heartbeat import HeartbeatWriter, clear_heartbeat, stop_requested
from tune import format as fmt
from tune.cluster.relay import WorkerLink
from tune.machine.gpu_slots import GpuSlots, claim_slot
from tune.ranks.actors import ActorPool
from tune.ranks.pool import RankPool, RankUnfit, run_on_ranks
from tune.remote.store import StoreError
from tune.remote.worker import StoreLost, Superseded, TrialStore, WorkerUploads
from tune.storage.journal import JOURNAL
from tune.trials.folder_lock import hold_folders
from tune.trials.trial import TrialResult, TrialSpec
from tune.trials.trial_group import Trials, Updates, run_trials

# Keys of a report: the updates since the last report, whether all unfinished trials have saved and stopped, whether
# this process can run no further trial, and its GPU, if it has chosen one.
UPDATES, PAUSED, UNUSABLE, GPU = "trial_updates", "trial_paused", "worker_unusable", "worker_gpu"
NODE_ID_LABEL = "ray.io/node-id"  # which Ray gives every node
MAX_NAME = 100  # characters of a trial's name in the title of a process, which Linux cuts at its end
STOP_SECONDS = 40.0  # for the last upload of trials that were asked to stop; the run waits a little longer
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE = re.compile(rf"\[Errno (?:{'|'.join(map(str, FULL))})\][^\n]*?(?:: '([^'\n]+)'|$)", re.MULTILINE)
log = logging.getLogger(__name__)
GAUGES = {
    "train_loss": "Training loss, nats per token",
    "val_loss": "Validation loss, nats per token",
    "tokens_per_second": "Training throughput of a trial",
}


def campaign_of(specs: Sequence[TrialSpec]) -> str:
    """The name of the results directory: that of the campaign, with `-smoke` after it for a smoke run."""
    return specs[0].folder.parents[1].name


def worker_title(specs: Sequence[TrialSpec]) -> str:
    """What a worker trains, in visible form: `quickstart alpha/alpha=0.2 seed 1 and 3 more`."""
    others = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
    return f"{campaign_of(specs)} {fmt.shorten(fmt.plain(specs[0].name), MAX_NAME)}{others}"


class NodeUnfit(RuntimeError):
    """No trial of the campaign can run on this node; the message says why."""

    @classmethod
    def of_rank(cls, error: str) -> tuple[int, str]:
        """The rank that cannot run, 0 if there is only one, and the reason, in a traceback of this exception."""
        message = error.rpartition(f"{cls.__name__}: ")[2].partition("\n")[0].strip()
        found = re.fullmatch(r"rank (\d+): (.*)", message)
        return (int(found[1]), found[2]) if found else (0, message)


@contextlib.contextmanager
def charging_node() -> Iterator[None]:
    """Turns the refusal of the object store into an error of the node, whose credentials they are."""
    try:
        yield
    except ConfigError as error:
        raise NodeUnfit(f"it cannot use the object store ({error})") from error


@contextlib.contextmanager
def naming_full_disk() -> Iterator[None]:
    """Turns a full disk into an error of the node."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise NodeUnfit(f"its disk is full ({error.filename or 'unknown file'})") from error


def full_disk(result: TrialResult) -> Path | None:
    """The file for which the disk had no space, if a trial has failed for that reason."""
    if result.status != "failed" or not (found := NO_SPACE.search(f"{result.error}\n{result.traceback}")):
        return None
    return Path(found[1] or "unknown file")


def rank_pool(config: dict[str, Any], campaign: str) -> RankPool | None:
    """The ranks of a worker whose trials train on several, in its placement group."""
    if (n_ranks := config.get("ranks", 1)) == 1:
        return None
    # A private Ray has one host; of another, the ranks may be on several.
    host = ray.util.get_node_ip_address() if config.get("relay") is not None else LOOPBACK
    about = {"bundle": config["resources"], "campaign": campaign, "umask": config.get("umask"), "host": host}
    return ActorPool(n_ranks, **about)


class TrialWorker(ray.tune.Trainable):
    """Trains one trial or group: each `step` runs to the next evaluation, and `reset_config` begins the next trials.

    Between trials the process keeps torch loaded, its CUDA context and the memory-mapped corpus.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
        """Returns the CPUs and GPUs per trial, and the nodes to `avoid`, which the executor puts into the config.

        Of several ranks, each has a bundle of its own, and this process, which only asks them to train, needs nothing.
        """
        n_ranks = config.get("ranks", 1)
        elsewhere = {NODE_ID_LABEL: f"!in({','.join(avoid)})"} if (avoid := config.get("avoid")) else None
        selector: dict[str, Any] = {"bundle_label_selector": [elsewhere] * n_ranks} if elsewhere else {}
        if n_ranks == 1:
            return ray.tune.PlacementGroupFactory([config["resources"]], **selector)
        bundles, strategy = [{}, *[config["resources"]] * n_ranks], config["placement"]
        return ray.tune.PlacementGroupFactory(bundles, strategy=strategy, **selector)

    def __repr__(self) -> str:
        """Names the worker in the dashboard and in `ray list actors --detail`.

        Ray asks for it once, when the worker has started, so it cannot name the trial; the process title does.
        """
        return f"TrialWorker(campaign={self._campaign}, pid={os.getpid()})"

    def setup(self, config: dict[str, Any]) -> None:
        """Begins the first trials; Tune calls it once per process."""
        if "umask" in config:  # a cluster's may differ from that of the run, which the results belong to
            os.umask(config["umask"])
            # A node that has just joined may get a trial before it is probed (tune/executors/ray_storage.py).
            root = config["specs"][0].folder.parents[1]
            if not config.get("uploads") and not (root / JOURNAL).exists():
                raise NodeUnfit(f"it does not see the results in {root}")
        self._campaign = campaign_of(config["specs"])
        tags = ("phase", "arm", "seed")
        self._gauges = {name: Gauge(f"ngpt_{name}", text, tag_keys=tags) for name, text in GAUGES.items()}
        slots: GpuSlots | None = config.get("gpu_slots")
        self._slot = None if slots is None else claim_slot(slots)  # before anything asks for GPUs
        self._pool = rank_pool(config, self._campaign)
        if (
            self._pool is None and config["resources"].get("GPU") and not gpus.is_available()
        ):  # with `device: auto` it would use the CPU
            raise NodeUnfit(f"Ray offers a GPU, but {gpus.why_unavailable()}")
        relay = config.get("relay")
        self._link = None if relay is None else WorkerLink(relay)
        uploads: WorkerUploads | None = config.get("uploads")
        with naming_full_disk():
            self._store = None if uploads is None else TrialStore(uploads)
            self._begin(config["specs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next trials."""
        self.cleanup()
        # `UNUSABLE` prevents this. If it returned False, Ray would abort the next trials without telling the searcher;
        # after an exception, another worker trains them.
        assert not self._is_unusable(), "a worker whose trial failed on a GPU is not reused"
        self._begin(new_config["specs"])
        return True

    def step(self) -> dict[str, Any]:
        """Trains until any trial is evaluated or ends."""
        # Ray sets the process title to the running method; the dashboard should show the trial instead. Only Ray's own
        # function can change the title.
        with ray._private.worker._changeproctitle(f"ray::{self._title}", "ray::TrialWorker"):
            updates = self._advance()
        self._note_ended(updates)
        if self._unfinished and len(self._trials_to_stop()) == len(self._unfinished):
            self._run.close()  # saves the trials
            self._leave(self._unfinished, updates)
            self._folders.close()
            # Includes the last evaluation, since it is not repeated after the saved step.
            return self._report(updates, **{PAUSED: True, "done": True})
        for trial_id in updates.interim.keys() & self._unfinished.keys():
            spec, metrics = self._unfinished[trial_id], updates.interim[trial_id].metrics
            for name, gauge in self._gauges.items():
                if metrics.get(name) is not None:
                    gauge.set(metrics[name], tags={"phase": spec.phase, "arm": spec.arm, "seed": str(spec.seed)})
        if self._unfinished:
            return self._report(updates)
        self._folders.close()
        if gpus.is_in_use() and not self._is_unusable():
            gpus.release_unused()  # for trials of other workers, while this one is idle
        return self._report(updates, done=True)

    def cleanup(self) -> None:
        """Closes the run when Tune ends the worker; trials with a stop request save first."""
        self._run.close()
        self._leave(self._unfinished)
        self._unfinished = {}
        self._folders.close()

    def _note_ended(self, updates: Updates) -> None:
        """Of trials that have ended, everything is in the store before the run hears of their results."""
        for trial_id, result in updates.ended.items():
            self._check_disk(trial_id, result)
            self._unfinished.pop(trial_id, None)
            self._has_failed |= result.status == "failed"
        if self._store is not None:
            with charging_node():
                self._store.flush(updates.ended)
            updates.files.update(self._store.parts(updates.ended, everything=True))
            updates.files.update(self._store.parts(updates.interim.keys() & self._unfinished.keys()))
            self._store.drop(updates.ended)

    def _check_disk(self, trial_id: str, result: TrialResult) -> None:
        """Raises NodeUnfit if a trial has failed because a disk of this host is full, not one that all hosts share."""
        if self._link is None or (full := full_disk(result)) is None:
            return
        if self._store is not None or (full.is_absolute() and not full.is_relative_to(self._roots[trial_id])):
            raise NodeUnfit(f"its disk is full ({full})")

    def _leave(self, trial_ids: Collection[str], updates: Updates | None = None) -> None:
        """Uploads what trials have that go on later or elsewhere; without the store, its newest state counts."""
        if self._store is None:
            return
        if updates is not None:
            updates.files.update(self._store.parts(trial_ids, everything=True))
        try:
            self._store.flush(trial_ids, STOP_SECONDS)
        except (StoreLost, Superseded, ConfigError, OSError) as error:
            log.warning("the last steps of %s are not in the store: %s", ", ".join(trial_ids), error)
            self._store.forget()
        else:
            self._store.drop(trial_ids)

    def _report(self, updates: Updates, **fields: bool) -> dict[str, Any]:
        report: dict[str, Any] = {UPDATES: updates, **fields}
        if self._is_unusable():
            report[UNUSABLE] = True
        if self._slot is not None:
            report[GPU] = self._slot.gpu
        return report

    def _is_unusable(self) -> bool:
        """Whether a trial has failed on a GPU: a CUDA error persists in the process, and memory may stay allocated."""
        return self._has_failed and gpus.is_in_use()

    def _begin(self, specs: Sequence[TrialSpec]) -> None:
        if self._slot is not None:
            specs = [replace(spec, packed=min(spec.packed, self._slot.workers)) for spec in specs]
        self._title = worker_title(specs)
        self._roots = {spec.trial_id: spec.folder.parents[1] for spec in specs}  # of the results, as the run sees them
        if self._store is not None:
            specs = [self._store.place(spec) for spec in specs]
        self._unfinished = {spec.trial_id: spec for spec in specs}
        self._run, self._folders = self._trials(specs), contextlib.ExitStack()
        self._has_begun, self._has_failed = False, False
        for spec in specs:  # gives the watchdog the process id, in case the trial hangs before its first step
            spec.folder.mkdir(parents=True, exist_ok=True)
            if self._link is not None:  # a request to an earlier attempt, which the campaign's host may not see
                clear_heartbeat(spec.folder)
            HeartbeatWriter(spec.folder).close()
        if self._link is not None:
            self._link.follow(specs)

    def _trials(self, specs: Sequence[TrialSpec]) -> Trials:
        if self._pool is None:
            yield from run_trials(specs)
            return
        (spec,) = specs
        try:
            yield from run_on_ranks(spec, self._pool)
        except RankUnfit as error:
            raise NodeUnfit(str(error)) from error

    def _trials_to_stop(self) -> list[str]:
        return [trial_id for trial_id, spec in self._unfinished.items() if stop_requested(spec.folder)]

    def _advance(self) -> Updates:
        """Runs to the next update; drops trials with a stop request, unless all of them have one."""
        if not self._has_begun:
            self._has_begun = True
            if self._pool is None:  # else the first rank holds it, since it may outlive this process
                self._folders.enter_context(hold_folders([*self._unfinished.values()]))
            if self._store is not None:
                with charging_node(), naming_full_disk():
                    self._store.begin(self._unfinished)
            return next(self._run)
        to_stop = self._trials_to_stop()
        if len(to_stop) == len(self._unfinished):
            to_stop = []
        dropped = {trial_id: self._unfinished.pop(trial_id) for trial_id in to_stop}
        updates = self._run.send(dropped.keys())
        for spec in dropped.values():
            clear_heartbeat(spec.folder)
        self._leave(dropped)
        return updates
