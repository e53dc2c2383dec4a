"""How many trials run at once, and what each gets of the machine. `--plan` and the executor ask the same function."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ngpt.config.base import ConfigError
from ngpt.system import gpus
from ngpt.system.cgroups import usable_cpus
from tune.spec.schema import Resources

RAY_UNITS = 10_000  # Ray counts resources in ten-thousandths
MOST_WORKERS = 1_000_000
NO_GPU = ("cpu", "mps")  # devices in the campaign file that need no GPU of CUDA
MOST_SHAPES = 4  # of nodes that a message lists

Node = Mapping[str, float]  # the numbers of "CPU" and "GPU" that it offers


@dataclass(frozen=True)
class Placement:
    """How many trials, or groups of trials, run at once, and the share of a node that each gets.

    With several ranks, each has its own share, on the same node unless the trial may be `across_nodes`.
    """

    workers: int
    cpus: float  # per trial, or per rank
    gpus: float
    trials_per_device: int  # at most; on a CPU the trials of a node share one device
    n_gpus: int = 0  # over which trials are spread; 0 on a CPU, and where Ray chooses the GPU
    ranks: int = 1
    across_nodes: bool = False

    def on(self, nodes: Sequence[Node], *, most: int | None = None, spread: bool = True) -> "Placement":
        """The placement on other nodes, at most `most` trials with the same share each; there may be room for none.

        `spread` says whether trials are spread over the GPUs before two of them share one.
        """
        rooms = [self._room(node) // (1 if self.across_nodes else self.ranks) for node in nodes]
        total = sum(rooms) // (self.ranks if self.across_nodes else 1)
        workers = min(total, most or MOST_WORKERS)
        if not self.gpus:
            return replace(self, workers=workers, trials_per_device=max(1, min(workers, max(rooms, default=0))))
        n_gpus = sum(int(node.get("GPU", 0)) for node in nodes) if spread else 0
        together = -(-workers // n_gpus) if n_gpus else workers
        return replace(self, workers=workers, trials_per_device=max(1, min(self._per_gpu, together)), n_gpus=n_gpus)

    @property
    def _per_gpu(self) -> int:
        return int(1 / self.gpus + 1e-6)

    def _room(self, node: Node) -> int:
        """The number of trials, or of ranks, that fit on a node."""
        counts = [node.get("CPU", 0) // self.cpus]
        if self.gpus:
            # A trial cannot be split between GPUs: at 0.4 GPUs each, two GPUs fit four trials, not five.
            n_gpus = node.get("GPU", 0)
            counts.append(int(n_gpus) * self._per_gpu if self.gpus < 1 else n_gpus // self.gpus)
        return int(min(counts))


def place(
    resources: Resources,
    nodes: Sequence[Node],
    *,
    device: str,
    trials_per_gpu: int | None = None,
    spread: bool = True,
) -> Placement:
    """Places trials that train on `device` on nodes.

    A trial runs on one node, and on one GPU unless it asks for several, or has several ranks with one each.
    `trials_per_gpu` is the measured number for `gpus_per_trial: auto`; without it, a trial has a GPU to itself.
    `spread` as in `Placement.on`.

    Raises:
        ConfigError: no node has room for even one trial, or the trials would train on the CPU of a node with GPUs
            although the campaign does not say so.
    """
    n_gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    share = _gpu_share(resources, device, n_gpus, trials_per_gpu)
    n_ranks, across = resources.ranks_per_trial, resources.across_nodes
    one = Placement(0, float(resources.cpus_per_rank), share, 1, ranks=n_ranks, across_nodes=across)
    placed = one.on(nodes, most=resources.workers, spread=spread)
    if placed.workers < 1:
        needed = f"{_count(n_ranks * placed.cpus, 'CPU')} and {_count(n_ranks * share, 'GPU')}"
        who = "a trial" if n_ranks == 1 else f"a trial of {n_ranks} ranks"
        where = " in total" if across else ""
        raise ConfigError(f"resources: {who} needs {needed}{where}, but {_describe(nodes, in_total=across)}")
    return placed


def _count(number: float, name: str) -> str:
    return f"{number:g} {name}{'' if number == 1 else 's'}"


def _describe(nodes: Sequence[Node], *, in_total: bool = False) -> str:
    sizes = Counter(f"{_count(node.get('CPU', 0), 'CPU')} and {_count(node.get('GPU', 0), 'GPU')}" for node in nodes)
    if len(nodes) < 2:
        return f"this cluster has {next(iter(sizes), 'no nodes')}"
    shapes = "; ".join(f"{size} ({_count(count, 'node')})" for size, count in sizes.most_common(MOST_SHAPES))
    if in_total:
        return f"this cluster has {shapes}"
    return f"none of the {len(nodes)} nodes of this cluster has as much: {shapes}"


def cpu_reason(resources: Resources, nodes: Sequence[Node], *, device: str) -> str | None:
    """Why trials on these nodes would train on the CPU although the campaign asks for no such thing, or None."""
    is_meant = device in NO_GPU or resources.gpus_per_trial != "auto"  # a number of GPUs is never replaced by a CPU
    if is_meant or any(node.get("GPU", 0) >= 1 for node in nodes):
        return None
    return f"base.device is {device}, and no node of the cluster has a GPU"


def wanted(resources: Resources, *, device: str) -> dict[str, float]:
    """What a trial, or each of its ranks, needs of a node that does not exist yet."""
    needed: dict[str, float] = {"CPU": resources.cpus_per_rank}
    if device in NO_GPU:
        return needed
    if n_gpus := 1 if resources.gpus_per_trial == "auto" else resources.gpus_per_rank:
        needed["GPU"] = n_gpus
    return needed


def ray_strategy(resources: Resources) -> str:
    """How Ray places the ranks of a trial: all on one node, or on as few as possible."""
    return "PACK" if resources.across_nodes else "STRICT_PACK"


def cluster_notes(resources: Resources, nodes: Sequence[Node], *, device: str) -> list[str]:
    """What is to be said about the GPUs of a cluster that others have started."""
    if reason := cpu_reason(resources, nodes, device=device):
        return [f"{reason}: trials train on the CPU (base.device: cpu says that this is meant)"]
    if device in NO_GPU or resources.gpus_per_trial != "auto" or resources.ranks_per_trial > 1:
        return []
    text = "in a running cluster, gpus_per_trial: auto is one trial for each GPU, since nothing is measured there"
    return [f"{text}; a share such as 0.5 lets trials use a GPU together"]


def _gpu_share(resources: Resources, device: str, n_gpus: int, trials_per_gpu: int | None) -> float:
    requested = resources.gpus_per_trial
    if device in NO_GPU:
        return 0.0
    if requested == "auto":
        most = trials_per_gpu or 1 if resources.ranks_per_trial == 1 else 1
        return int(RAY_UNITS / most) / RAY_UNITS if n_gpus else 0.0
    if not requested and n_gpus:
        are = "is 1 GPU" if n_gpus == 1 else f"are {n_gpus} GPUs"
        text = f"resources.gpus_per_trial: 0 trains on the CPU, but base.device is {device} and there {are}"
        raise ConfigError(f"{text}; set base.device to cpu, or leave out gpus_per_trial")
    return float(resources.gpus_per_rank)


def this_machine(resources: Resources, *, device: str) -> dict[str, int]:
    """What a private Ray offers on this machine; no GPUs if the trials use none."""
    cpus, needed = usable_cpus(), resources.cpus_per_rank * resources.ranks_per_trial
    # The user may run more workers than there are cores; each then gets its threads, and all are slower. Ranks beyond
    # the cores would only wait for each other.
    if resources.ranks_per_trial == 1 or needed <= cpus:
        cpus = max(cpus, (resources.workers or 1) * needed)
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
