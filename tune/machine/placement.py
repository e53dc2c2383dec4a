"""How many trials run at once, and what each gets of the machine. `--plan` and the executor ask the same function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ngpt.config.base import ConfigError
from ngpt.system import gpus
from ngpt.system.cgroups import usable_cpus
from tune.spec.schema import Resources

RAY_UNITS = 10_000  # Ray counts resources in ten-thousandths
MOST_WORKERS = 1_000_000
NO_GPU = ("cpu", "mps")  # devices in the campaign file that need no GPU of CUDA


@dataclass(frozen=True)
class Placement:
    """How many trials, or groups of trials, run at once, and the share of a node that each gets."""

    workers: int
    cpus: float  # per trial
    gpus: float  # per trial
    trials_per_device: int  # at most, if the trials are spread over the GPUs; on a CPU all trials share one device
    n_gpus: int = 0  # over which trials are spread


def place(
    resources: Resources, nodes: Sequence[Mapping[str, float]], *, device: str, trials_per_gpu: int | None = None
) -> Placement:
    """Places trials that train on `device` on nodes with these numbers of "CPU" and "GPU".

    A trial runs on one node, and on one GPU unless it asks for several. `trials_per_gpu` is the measured number for
    `gpus_per_trial: auto`; without it, a trial has a GPU to itself.

    Raises:
        ConfigError: no node has room for even one trial, or the trials would train on the CPU of a node with GPUs
            although the campaign does not say so.
    """
    cpus, n_gpus = float(resources.cpus_per_trial), sum(int(node.get("GPU", 0)) for node in nodes)
    share = _gpu_share(resources, device, n_gpus, trials_per_gpu)
    per_gpu = int(1 / share + 1e-6) if share else 0

    def room(node: Mapping[str, float]) -> int:
        counts = [node.get("CPU", 1) // cpus]
        if share:
            # A trial cannot be split between GPUs: at 0.4 GPUs each, two GPUs fit four trials, not five.
            counts.append(int(node.get("GPU", 0)) * per_gpu if share < 1 else node.get("GPU", 0) // share)
        return int(min(counts))

    workers = min(sum(map(room, nodes)), resources.workers or MOST_WORKERS)
    if workers < 1:
        available = f"{max((node.get('CPU', 0) for node in nodes), default=0):g} CPUs and {n_gpus:g} GPUs"
        needed = f"{cpus:g} CPUs and {share:g} GPUs"
        raise ConfigError(f"resources: a trial needs {needed}, but this cluster has {available}")
    if not share:
        return Placement(workers, cpus, share, trials_per_device=workers)
    most = max(1, min(per_gpu, -(-workers // n_gpus)))
    return Placement(workers, cpus, share, trials_per_device=most, n_gpus=n_gpus)


def _gpu_share(resources: Resources, device: str, n_gpus: int, trials_per_gpu: int | None) -> float:
    requested = resources.gpus_per_trial
    if device in NO_GPU:
        return 0.0
    if requested == "auto":
        return int(RAY_UNITS / (trials_per_gpu or 1)) / RAY_UNITS if n_gpus else 0.0
    if not requested and n_gpus:
        are = "is 1 GPU" if n_gpus == 1 else f"are {n_gpus} GPUs"
        text = f"resources.gpus_per_trial: 0 trains on the CPU, but base.device is {device} and there {are}"
        raise ConfigError(f"{text}; set base.device to cpu, or leave out gpus_per_trial")
    return float(requested)


def this_machine(resources: Resources, *, device: str) -> dict[str, int]:
    """What a private Ray offers on this machine; no GPUs if the trials use none."""
    # The user may run more workers than there are cores; each then gets its threads, and all are slower.
    cpus = max(usable_cpus(), (resources.workers or 1) * resources.cpus_per_trial)
    return {"CPU": cpus, "GPU": 0 if device in NO_GPU else len(gpus.visible_ids())}


def device_notes(resources: Resources, *, device: str) -> list[str]:
    """What is to be said about the GPUs of this machine, so that no campaign trains on the CPU in silence."""
    if device in NO_GPU:
        text = f"base.device is {device}, so no GPU is reserved and resources.gpus_per_trial has no effect"
        return [] if resources.gpus_per_trial in ("auto", 0) else [text]
    if gpus.is_available() or not gpus.has_driver() or gpus.is_hidden():
        return []
    text = f"a GPU driver is installed, but {gpus.why_unavailable()}: trials train on the CPU"
    return [f"{text} (base.device: cpu says that this is meant)"]
