"""A worker as Ray Tune sees it: one process that trains one trial or group after another, without starting
anew.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray._private.worker
import ray.tune
import torch
from ray.util.metrics import Gauge

from ngpt.system.heartbeat import Heartbeat, clear, stop_requested
from tune.trials.trial import TrialSpec
from tune.trials.trial_group import Updates, run_trials

# The keys of reports: what has happened since the last one, by trial; and that those which are left have saved and
# stopped because they were asked to.
UPDATES, PAUSED = "trial_news", "trial_paused"


class TrialWorker(ray.tune.Trainable):
    """Advances the generator of its trials by one evaluation per `step`; `reset_config` begins the next ones.

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
        self._begin(config["specs"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called for every further trial; True says that the process can be used again.

        Not after a failed one on a GPU: a CUDA error stays in the process, and an exhausted memory may stay full.
        """
        self._run.close()
        if self._failed and torch.cuda.is_initialized():
            return False
        self._begin(new_config["specs"])
        return True

    def step(self) -> dict[str, Any]:
        """Trains up to the next evaluation of any of its trials, or to an end."""
        # Ray titles a process after the method it runs; the trial's name is what one wants to see in the dashboard. It
        # has its own way of writing titles, and other libraries' do not show in its processes.
        with ray._private.worker._changeproctitle(f"ray::{self._title}", "ray::TrialWorker"):
            news = self._advance()
        for trial_id, result in news.ended.items():
            self._left.pop(trial_id, None)
            self._failed |= result.status == "failed"
        if self._left and len(self._asked_to_stop()) == len(self._left):
            self._run.close()
            # With the evaluation it was at, if it was at one: that step is saved, and does not come again.
            return {UPDATES: news, PAUSED: True, "done": True}
        for spec in self._left.values():
            interim = news.interim.get(spec.trial_id)
            for name, gauge in self._gauges.items():
                if interim and (value := interim.metrics.get(name)) is not None:
                    gauge.set(value, tags={"phase": spec.phase, "arm": spec.arm, "seed": str(spec.seed)})
        return {UPDATES: news} | ({} if self._left else {"done": True})

    def cleanup(self) -> None:
        """Closes the run under way when Tune ends the worker; if it was asked to stop it saves first."""
        self._run.close()

    def _begin(self, specs: Sequence[TrialSpec]) -> None:
        self._left = {spec.trial_id: spec for spec in specs}
        others = f" and {len(specs) - 1} more" if len(specs) > 1 else ""
        self._title = f"{specs[0].name}{others}"
        self._run = run_trials(specs)
        self._began, self._failed = False, False
        for spec in specs:
            show_life(spec.folder)

    def _asked_to_stop(self) -> list[str]:
        return [trial_id for trial_id, spec in self._left.items() if stop_requested(spec.folder)]

    def _advance(self) -> Updates:
        """Goes on without those of its trials that were asked to stop, if there are others."""
        if not self._began:
            self._began = True
            return next(self._run)
        asked = self._asked_to_stop()
        unwanted = {} if len(asked) == len(self._left) else {trial_id: self._left.pop(trial_id) for trial_id in asked}
        news = self._run.send(unwanted.keys())
        for spec in unwanted.values():
            clear(spec.folder)
        return news


def show_life(folder: Path) -> None:
    """Says which process has a trial now: one that hangs before the first step can be found, too."""
    folder.mkdir(parents=True, exist_ok=True)
    Heartbeat(folder).close()
