"""What a session knows of the executor that runs its trials."""

from dataclasses import dataclass

from ngpt.config.base import UserError
from ngpt.system.cli import EXIT_ERROR
from ngpt.trackers.config import TrackerConfig
from tune.machine.gpu_sharing import GpuSharing


class ExecutorLost(UserError):
    """The executor died and is not restarted. Running the same command again resumes the campaign."""

    exit_code = EXIT_ERROR


@dataclass(frozen=True)
class ExecutorInfo:
    """Properties of the executor that runs the trials of a session."""

    workers: int = 1  # trials or groups that run concurrently; 0 while a cluster has no node with room for one
    trials_per_device: int = 1  # at most
    n_gpus: int = 0  # over which trials are spread; 0 on a CPU, and where Ray chooses the GPU
    dashboard_url: str | None = None
    gpu_sharing: GpuSharing | None = None  # the measurement that chose `trials_per_device`, if there was one
    notes: tuple[str, ...] = ()  # on where trials train, for the warnings of the report
    tracker: TrackerConfig | None = None  # how every trial uses the tracking tools; None: as in the campaign file

    def packed(self, unfinished: int, *, ranks: int) -> int:
        """Returns how many trials may share a device with one that starts now, including itself.

        Args:
            unfinished: trials without a result, including those that run.
            ranks: devices that each trial trains on.
        """
        if not self.n_gpus:
            return self.trials_per_device
        if ranks > 1:
            return 1  # each rank has a GPU of its own
        return min(self.trials_per_device, max(1, -(-unfinished // self.n_gpus)))
