"""GPUs and the links between them: what their makers state, in bytes, FLOP/s and bytes/s.

Sources: the data sheets of NVIDIA for A100, H100 and H200 (SXM), where rates with sparsity are halved, and those of
DGX A100 and DGX H100 for the network (eight adapters of 200 or 400 Gb/s for eight GPUs). NVLink is stated as the sum
of both directions, so half of it is sent.
"""

from dataclasses import dataclass

from ngpt.config.base import ConfigError, unknown_message

GPUS_PER_NODE = 8
RESERVED_MEMORY = 0.1  # share of a GPU that is kept free: CUDA's context, libraries, fragmentation


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, in nodes of eight."""

    memory: float  # bytes
    flops: float  # FLOP/s of dense bfloat16 products
    float32_flops: float  # FLOP/s of float32 products, without TF32
    nvlink: float  # bytes/s that a GPU sends to the others of its node
    network: float  # bytes/s that a node sends to others

    @property
    def usable(self) -> float:
        """The bytes that a run may plan with."""
        return self.memory * (1 - RESERVED_MEMORY)

    def rate(self, dtype: str) -> float:
        """FLOP/s of matrix products in this precision."""
        return self.flops if dtype == "bfloat16" else self.float32_flops


GPUS = {
    "a100-40gb": Gpu(40e9, 312e12, 19.5e12, 300e9, 200e9),
    "a100-80gb": Gpu(80e9, 312e12, 19.5e12, 300e9, 200e9),
    "h100": Gpu(80e9, 989e12, 67e12, 450e9, 400e9),
    "h200": Gpu(141e9, 989e12, 67e12, 450e9, 400e9),
}
COMMON = ("h100", "h200")  # with 80 and 141 GB


def find_gpu(name: str) -> Gpu:
    """Returns a GPU of the table; raises ConfigError for another name."""
    if name not in GPUS:
        raise ConfigError(unknown_message("GPU", name, GPUS))
    return GPUS[name]
