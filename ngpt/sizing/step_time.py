"""Time and traffic of a training step on paper: FLOPs at an assumed share of the peak, and messages in rings.

Nothing here has been measured on a GPU. The time of a message follows the tuner of NCCL (src/graph/tuning.cc at
01afd20): a base latency, one for each hop in the ring, and the bytes at the bandwidth of the slowest link. NCCL may
choose trees, which have fewer hops, so many ranks and small messages come out too slow here.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ngpt.model.flops import flops_per_token
from ngpt.sizing.hardware import GPUS_PER_NODE, Gpu
from ngpt.sizing.memory import FLOAT_BYTES, micro_batch_size, shapes_of
from ngpt.training.config import TrainConfig

MFU = 0.4  # share of the peak; Llama 3 trained at 0.38 to 0.43 on H100s (arXiv 2407.21783, table 4)
LINK_SHARE = 0.8  # of the stated bandwidth that large messages reach
BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel by default
# Seconds, of NCCL's rings: base, hop by NVLink, hop by the network; then the share of the bandwidth. Simple and LL128.
PROTOCOLS = ((8.4e-6, 3.4e-6, 9.6e-6, 1.0), (10e-6, 1.9e-6, 4e-6, 0.92))
GRADIENT_BYTES = {"float32": 4.0, "bfloat16": 2.0}  # of a number that is summed over the ranks


@dataclass(frozen=True)
class Message:
    """Collectives of one kind in a step."""

    kind: str  # all_reduce, all_gather, reduce_scatter or all_to_all
    size: float  # bytes of the whole, of all collectives together
    count: int
    phase: str  # with which computation it overlaps: forward, backward, or update, where there is none

    def sent(self, ranks: int) -> float:
        """The bytes that each rank sends, in a ring: no algorithm sends less without help of the network."""
        return self.size * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and bytes that each rank sends in it."""

    compute: float
    exposed: float  # seconds of communication that no computation hides
    sent: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks together."""
        return self.tokens / (self.compute + self.exposed)

    @property
    def efficiency(self) -> float:
        """The share of the time in which the ranks compute."""
        return self.compute / (self.compute + self.exposed)


def messages(config: TrainConfig, ranks: int, *, strategy: str) -> list[Message]:
    """What the ranks exchange in a step, without losses, norms and agreements of a few bytes."""
    return list(_messages(config, ranks, strategy)) if ranks > 1 else []


def _messages(config: TrainConfig, ranks: int, strategy: str) -> Iterator[Message]:
    micro_batch, n_layer = micro_batch_size(config, ranks), config.model.n_layer
    shapes = shapes_of(config.model, config.dtype, micro_batch)
    entries, passes = shapes.entries(n_layer), -(-config.batch_size // (micro_batch * ranks))
    whole, matrices = FLOAT_BYTES * entries.total(), FLOAT_BYTES * entries["matrices"]
    if strategy == "fsdp":
        blocks = FLOAT_BYTES * n_layer * shapes.block.total()
        yield Message("all_gather", passes * whole, passes * (n_layer + 1), "forward")
        yield Message("all_gather", passes * blocks, passes * n_layer, "backward")
        yield Message("reduce_scatter", whole, n_layer + 1, "backward")
    elif (dtype := config.distributed.gradient_dtype) == "float8":
        yield Message("all_gather", ranks * entries.total(), math.ceil(whole / BUCKET_BYTES), "backward")
    else:
        size = GRADIENT_BYTES[dtype] * entries.total()
        yield Message("all_reduce", size, math.ceil(whole / BUCKET_BYTES), "backward")
    if "muon" in config.optim.name:  # one rank orthogonalizes a matrix
        if strategy == "fsdp":  # its parts go there, and those of the result back
            yield Message("all_to_all", 2 * matrices / ranks, 8, "update")
        else:
            yield Message("all_gather", matrices, 4, "update")


def step_time(
    config: TrainConfig, gpu: Gpu, ranks: int, *, strategy: str, recompute: bool, mfu: float = MFU
) -> StepTime:
    """Returns the time of a step for a config with a vocabulary, on `ranks` GPUs in nodes of eight.

    Forward and backward pass compute one and two thirds of the FLOPs. Communication hides behind the computation of its
    phase, except the last bucket of gradients, and the first weights that FSDP2 gathers. With several micro-batches,
    gradients are exchanged during the last one only.
    """
    per_token = flops_per_token(config.model)
    seconds = config.tokens_per_step * per_token / (gpu.rate(config.dtype) * mfu * ranks)
    # Activation checkpointing computes the blocks' forward pass twice, here counted as the whole forward pass.
    forward, backward = seconds / 3, seconds * (1 if recompute else 2 / 3)
    passes = -(-config.batch_size // (micro_batch_size(config, ranks) * ranks))
    room = {"forward": forward, "backward": backward if strategy == "fsdp" else backward / passes, "update": 0.0}
    found = messages(config, ranks, strategy=strategy)
    exposed = 0.0
    for phase, hidden in room.items():
        times = [(message_seconds(each, gpu, ranks), each.count) for each in found if each.phase == phase]
        total, one = sum(time for time, _ in times), max((time / count for time, count in times), default=0.0)
        exposed += max(total - hidden, one)
    sent = sum(each.sent(ranks) for each in found)
    return StepTime(forward + backward, exposed, sent, config.tokens_per_step)


def message_seconds(message: Message, gpu: Gpu, ranks: int) -> float:
    """The seconds of these collectives one after another, in a ring through all ranks."""
    nodes = -(-ranks // GPUS_PER_NODE)
    rounds = 2 if message.kind == "all_reduce" else 1
    hops, slow_hops = rounds * (ranks - 1), rounds * (nodes - 1)
    bandwidth = LINK_SHARE * (gpu.nvlink if nodes == 1 else min(gpu.nvlink, gpu.network))
    return min(
        message.count * (base + (hops - slow_hops) * near + slow_hops * far) + message.sent(ranks) / (bandwidth * share)
        for base, near, far, share in PROTOCOLS
    )
