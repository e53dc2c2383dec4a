"""A Ray Tune worker process that trains trials, or groups of trials, one after another without a restart."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray._private.worker
import ray.tune
from ray.util.metrics import Gauge

from ngpt.system import gpus
from ngpt.system.heartbeat import HeartbeatWriter, clear_heartbeat, stop_requested
from tune.executors.gpu_slots import GpuSlots, claim_slot
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import Updates, run_trials

# Keys of a report: the updates since the last report, whether all unfinished trials have saved and stopped, whether
# this process can run no further trial, and its GPU, if it has chosen one.
UPDATES, PAUSED, UNUSABLE, GPU = "trial_updates", "trial_paused", "worker_unusable", "worker_gpu"
GAUGES = {
    "train_loss": "Training loss, nats per token",
    "val_loss": "Validation loss, nats per token",
    "tokens_per_second": "Training throughput of a trial",
}


class TrialWorker(ray.tune.Trainable):
    """Trains one trial or group: each `step` runs to the next evaluation, and `reset_config` begins the next trials.

    Between trials the process keeps torch loaded, its CUDA context and the memory-mapped corpus.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
        """Returns the CPUs and GPUs per trial, which the executor puts into the config."""
        return ray.tune.PlacementGroupFactory([config["resources"]])

    def __repr__(self) -> str:
        """Names the process in the dashboard and the logs; the process title names the trial."""
        return f"TrialWorker(pid={os.getpid()})"

    def setup(self, config: dict[str, Any]) -> None:
        """Begins the first trials; Tune calls it once per process."""
        if "umask" in config:  # a cluster's may differ from that of the run, which the results belong to
            os.umask(config["umask"])
        tags = ("phase", "arm", "seed")
        self._gauges = {name: Gauge(f"ngpt_{name}", text, tag_keys=tags) for name, text in GAUGES.items()}
        slots: GpuSlots | None = config.get("gpu_slots")
        self._slot = None if slots is None else claim_slot(slots)  # before anything asks for GPUs
        self._begin(config["specs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begins the next trials."""
        self._run.close()
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
        for trial_id, result in updates.ended.items():
            self._unfinished.pop(trial_id, None)
            self._has_failed |= result.status == "failed"
        if self._unfinished and len(self._trials_to_stop()) == len(self._unfinished):
            self._run.close()  # saves the trials
            # Includes the last evaluation, since it is not repeated after the saved step.
            return self._report(updates, **{PAUSED: True, "done": True})
        for trial_id in updates.interim.keys() & self._unfinished.keys():
            spec, metrics = self._unfinished[trial_id], updates.interim[trial_id].metrics
            for name, gauge in self._gauges.items():
                if metrics.get(name) is not None:
                    gauge.set(metrics[name], tags={"phase": spec.phase, "arm": spec.arm, "seed": str(spec.seed)})
        if self._unfinished:
            return self._report(updates)
        if gpus.is_in_use() and not self._is_unusable():
            gpus.release_unused()  # for trials of other workers, while this one is idle
        return self._report(updates, done=True)

    def cleanup(self) -> None:
        """Closes the run when Tune ends the worker; trials with a stop request save first."""
        self._run.close()

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
        self._unfinished = {spec.trial_id: spec for spec in specs}
        others = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
        self._title = f"{specs[0].name}{others}"
        self._run = run_trials(specs)
        self._has_begun, self._has_failed = False, False
        for spec in specs:  # gives the watchdog the process id, in case the trial hangs before its first step
            spec.folder.mkdir(parents=True, exist_ok=True)
            HeartbeatWriter(spec.folder).close()

    def _trials_to_stop(self) -> list[str]:
        return [trial_id for trial_id, spec in self._unfinished.items() if stop_requested(spec.folder)]

    def _advance(self) -> Updates:
        """Runs to the next update; drops trials with a stop request, unless all of them have one."""
        if not self._has_begun:
            self._has_begun = True
            return next(self._run)
        to_stop = self._trials_to_stop()
        if len(to_stop) == len(self._unfinished):
            to_stop = []
        dropped = {trial_id: self._unfinished.pop(trial_id) for trial_id in to_stop}
        updates = self._run.send(dropped.keys())
        for spec in dropped.values():
            clear_heartbeat(spec.folder)
        return updates
