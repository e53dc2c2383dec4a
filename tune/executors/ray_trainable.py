"""A worker process of Ray Tune: it trains one trial or group after another without a restart."""

import os
from collections.abc import Sequence
from typing import Any

import ray._private.worker
import ray.tune
import torch
from ray.util.metrics import Gauge

from ngpt.system.heartbeat import HeartbeatWriter, clear_heartbeat, stop_requested
from ngpt.training.state import Metrics
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import Updates, run_trials

# Keys of a report: what has happened since the last one, and that all unfinished trials have saved and stopped.
UPDATES, PAUSED = "trial_updates", "trial_paused"
GAUGES = {
    "train_loss": "Training loss, nats per token",
    "val_loss": "Validation loss, nats per token",
    "tokens_per_second": "Training throughput of a trial",
}


class TrialWorker(ray.tune.Trainable):
    """Runs its trials up to the next evaluation per `step`; `reset_config` begins the next ones.

    Between trials it keeps the interpreter with torch loaded, the CUDA context, and the mapped corpus.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
        """CPUs and GPUs of a trial, which the executor has put into its config."""
        return ray.tune.PlacementGroupFactory([config["resources"]])

    def __repr__(self) -> str:
        """The name of the process in the dashboard and the logs; its title names the trial."""
        return f"TrialWorker(pid={os.getpid()})"

    def setup(self, config: dict[str, Any]) -> None:
        """Called once per process."""
        tags = ("phase", "arm", "seed")
        self._gauges = {name: Gauge(f"ngpt_{name}", about, tag_keys=tags) for name, about in GAUGES.items()}
        self._begin(config["specs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called for every further trial; returns whether the process can run it.

        After a failure on a GPU it cannot: a CUDA error stays in the process, and the memory may stay full.
        """
        self._run.close()
        if self._has_failed and torch.cuda.is_initialized():
            return False
        self._begin(new_config["specs"])
        return True

    def step(self) -> dict[str, Any]:
        """Trains up to the next evaluation of any of its trials, or to the end of one."""
        # Ray titles a process after the running method; the dashboard should show the trial. Only Ray's own function
        # changes the title of its processes.
        with ray._private.worker._changeproctitle(f"ray::{self._title}", "ray::TrialWorker"):
            updates = self._advance()
        for trial_id, result in updates.ended.items():
            self._unfinished.pop(trial_id, None)
            self._has_failed |= result.status == "failed"
        if self._unfinished and len(self._trials_to_stop()) == len(self._unfinished):
            self._run.close()  # which saves
            # The evaluation goes along: its step is saved and is not evaluated again.
            return {UPDATES: updates, PAUSED: True, "done": True}
        for trial_id in updates.interim.keys() & self._unfinished.keys():
            self._show(self._unfinished[trial_id], updates.interim[trial_id].metrics)
        return {UPDATES: updates} | ({} if self._unfinished else {"done": True})

    def cleanup(self) -> None:
        """Closes the run when Tune ends the worker; a run with a stop request saves first."""
        self._run.close()

    def _begin(self, specs: Sequence[TrialSpec]) -> None:
        self._unfinished = {spec.trial_id: spec for spec in specs}
        others = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
        self._title = f"{specs[0].name}{others}"
        self._run = run_trials(specs)
        self._has_begun, self._has_failed = False, False
        for spec in specs:  # tells the watchdog the process of a trial that hangs before its first step
            spec.folder.mkdir(parents=True, exist_ok=True)
            HeartbeatWriter(spec.folder).close()

    def _trials_to_stop(self) -> list[str]:
        return [trial_id for trial_id, spec in self._unfinished.items() if stop_requested(spec.folder)]

    def _advance(self) -> Updates:
        """Runs to the next event; trials with a stop request are left out, unless all have one."""
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

    def _show(self, spec: TrialSpec, metrics: Metrics) -> None:
        """Sets the gauges of the dashboard."""
        for name, gauge in self._gauges.items():
            if (value := metrics.get(name)) is not None:
                gauge.set(value, tags={"phase": spec.phase, "arm": spec.arm, "seed": str(spec.seed)})
