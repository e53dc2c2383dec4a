"""A worker as Ray Tune sees it: one process that trains one trial after another, without starting anew."""

import os
from pathlib import Path
from typing import Any

import ray._private.worker
import ray.tune
import torch
from ray.util.metrics import Gauge

from ngpt.pulse import Pulse, is_asked_to_stop
from tune.trial import TrialSpec, run_trial

# The keys of a trial's reports: what came of it in the last one, and what it has reached so far in the others; or that
# it has saved and stopped because it was asked to.
RESULT, SO_FAR, PAUSED = "trial_result", "trial_so_far", "trial_paused"


class TrialWorker(ray.tune.Trainable):
    """Advances the generator of a trial by one evaluation per `step`; `reset_config` begins the next trial.

    What survives between trials: the interpreter with torch loaded, the CUDA context, and the mapped corpus.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> ray.tune.PlacementGroupFactory:
        """CPUs and GPUs of a trial, as the executor has put them into its config."""
        return ray.tune.PlacementGroupFactory([config["resources"]])

    def __repr__(self) -> str:
        """How the dashboard and the logs call the process; the trial it is at shows as its process title."""
        return f"TrialWorker(pid={os.getpid()})"

    def setup(self, config: dict[str, Any]) -> None:
        """Called once per process."""
        tags = ("phase", "arm", "seed")
        self._gauges = {
            "train_loss": Gauge("ngpt_train_loss", "Training loss, nats per token", tag_keys=tags),
            "val_loss": Gauge("ngpt_val_loss", "Validation loss, nats per token", tag_keys=tags),
            "tokens_per_second": Gauge("ngpt_tokens_per_second", "Training throughput of a trial", tag_keys=tags),
        }
        self._begin(config["spec"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called for every further trial; True says that the process can be used again.

        Not after a failed one on a GPU: a CUDA error stays in the process, and an exhausted memory may stay full.
        """
        self._run.close()
        if self._failed and torch.cuda.is_initialized():
            return False
        self._begin(new_config["spec"])
        return True

    def step(self) -> dict[str, Any]:
        """Trains up to the next evaluation, or to the end."""
        # Ray titles a process after the method it runs; the trial's name is what one wants to see in the dashboard. It
        # has its own way of writing titles, and other libraries' do not show in its processes.
        title = ray._private.worker._changeproctitle(f"ray::{self._spec.name}", "ray::TrialWorker")
        try:
            with title:
                so_far = next(self._run)
        except StopIteration as stop:
            self._failed = stop.value.status == "failed"
            return {RESULT: stop.value, "done": True}
        if is_asked_to_stop(self._spec.folder):
            self._run.close()
            return {PAUSED: True, "done": True}
        phase, arm = self._spec.phase, self._spec.arm
        for name, gauge in self._gauges.items():
            if (value := so_far.metrics.get(name)) is not None:
                gauge.set(value, tags={"phase": phase, "arm": arm, "seed": str(self._spec.seed)})
        return {SO_FAR: so_far}

    def cleanup(self) -> None:
        self._run.close()

    def _begin(self, spec: TrialSpec) -> None:
        self._spec = spec
        self._run = run_trial(spec)
        self._failed = False
        show_life(spec.folder)


def show_life(folder: Path) -> None:
    """Says which process has a trial now: one that hangs before the first step can be found, too."""
    folder.mkdir(parents=True, exist_ok=True)
    Pulse(folder).close()
