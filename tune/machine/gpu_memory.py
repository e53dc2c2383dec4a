"""`--plan`: whether the trials of a campaign fit into the memory of their GPUs."""

from collections.abc import Iterable, Iterator

from ngpt.model.flops import matrix_params
from ngpt.sizing.hardware import COMMON, GPUS, RESERVED_MEMORY
from ngpt.sizing.memory import RankMemory, micro_batch_size, rank_memory
from ngpt.system import gpus
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.spec.schema import Resources

SMALL = 5e8  # bytes, roughly, of a trial on one device that needs no line
MOST_TRACED = 4  # arms, the roughly largest; each is traced within about half a second


def memory_notes(configs: Iterable[TrainConfig], resources: Resources) -> list[str]:
    """Returns what is to be said about the memory of the largest trial, and what would help if it does not fit.

    Says nothing about small trials of one rank, and about trials for the CPU. On a machine without a GPU it names
    common ones.
    """
    if resources.gpus_per_trial == 0:
        return []
    n_ranks = resources.ranks_per_trial
    rough = {_shape(config): (_rough_bytes(config, n_ranks), config) for config in configs if config.device != "cpu"}
    largest = sorted(rough.values(), key=lambda entry: entry[0])[-MOST_TRACED:]
    if not largest or (n_ranks == 1 and largest[-1][0] < SMALL):
        return []
    needs = [(_needed(config, n_ranks, resources.strategy), config) for _, config in largest]
    needed, config = max(needs, key=lambda entry: entry[0].total)
    return list(_lines(config, needed, resources))


def _lines(config: TrainConfig, needed: RankMemory, resources: Resources) -> Iterator[str]:
    n_ranks = resources.ranks_per_trial
    who = "the largest trial needs" if n_ranks == 1 else f"each of {n_ranks} ranks of the largest trial needs"
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimizer": needed.moments,
        "activations": needed.activations,
        "loss and exchange": needed.loss + needed.exchange,
    }
    text = f"memory: {who} at most {fmt.size(needed.total)}"
    yield f"{text}: {', '.join(f'{name} {fmt.size(amount)}' for name, amount in parts.items())}"
    if gpus.is_available():
        device = gpus.current()
        total = gpus.memory(device)[1]
        room, here = total * (1 - RESERVED_MEMORY), f"{gpus.name(device)} of this machine, {fmt.size(total)},"
        holders, missing = ([here] if needed.total <= room else []), f"the {here} does"
    else:
        room = max(GPUS[name].usable for name in COMMON)
        holders = [fmt.size(round(GPUS[name].memory)) for name in COMMON if needed.total <= GPUS[name].usable]
        missing = f"GPUs of {fmt.listing(fmt.size(round(GPUS[name].memory)) for name in COMMON)} do"
    if not holders:
        yield f"warning: {missing} not hold it with {RESERVED_MEMORY:.0%} kept free; {_remedy(config, resources, room)}"
    elif not gpus.is_available():
        yield f"memory: a GPU of {' or '.join(holders)} would hold it; this machine has none"


def _remedy(config: TrainConfig, resources: Resources, room: float) -> str:
    """What would make a trial fit, the least change first."""
    n_ranks, strategy = resources.ranks_per_trial, resources.strategy
    recomputing = config.model_copy(update={"activation_checkpointing": True})
    if _needed(recomputing, n_ranks, strategy).total <= room:
        return "with activation_checkpointing: true they would"
    size = micro_batch_size(config, n_ranks)
    while size > 1 and size % 2 == 0:
        size //= 2
        if _needed(config.model_copy(update={"micro_batch_size": size}), n_ranks, strategy).total <= room:
            return f"with micro_batch_size: {size} they would"
    for count in (2, 4, 8):
        fits = count > n_ranks or strategy != "fsdp"
        if fits and not config.batch_size % count and _needed(config, count, "fsdp").total <= room:
            return f"with ranks_per_trial: {count} and strategy: fsdp they would"
    return "neither activation_checkpointing, a smaller micro_batch_size nor strategy: fsdp on 8 ranks alone is enough"


def _needed(config: TrainConfig, n_ranks: int, strategy: str) -> RankMemory:
    return rank_memory(config, n_ranks, strategy=strategy, recompute=config.activation_checkpointing)


def _rough_bytes(config: TrainConfig, n_ranks: int) -> int:
    """Bytes of a trial by rule of thumb: 16 for each weight, and 100 for each unit of the stream in each block."""
    model = config.model
    tokens = micro_batch_size(config, n_ranks) * model.block_size
    return 16 * matrix_params(model) + 100 * tokens * model.n_layer * model.n_embd


def _shape(config: TrainConfig) -> tuple[object, ...]:
    """What the memory of a trial depends on; other arms need not be traced again."""
    sizes = config.batch_size, config.micro_batch_size, config.activation_checkpointing
    return config.model, config.optim.name, config.dtype, *sizes
