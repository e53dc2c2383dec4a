"""Gradients in fewer bits: hooks for DistributedDataParallel that average a bucket over the ranks.

`COMPRESSIONS` holds functions (group) -> hook; None leaves the average to DistributedDataParallel, in float32. A hook
starts one collective for each bucket, in the order of the buckets. The next buckets are computed meanwhile.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]

Hook = Callable[[object, GradBucket], torch.futures.Future[Tensor]]
LARGEST_FLOAT8 = 448.0  # of float8_e4m3fn


def bfloat16(group: dist.ProcessGroup) -> Hook:
    """Sums the gradients of the ranks in bfloat16: 4 (N - 1) / N bytes per number and rank, half of float32's."""

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        gradient = bucket.buffer()
        rounded = gradient.to(torch.bfloat16).div_(dist.get_world_size(group))
        work = dist.all_reduce(rounded, group=group, async_op=True)
        assert work is not None
        return work.get_future().then(lambda _: gradient.copy_(rounded))

    return hook


def float8(group: dist.ProcessGroup) -> Hook:
    """Gathers the gradients of all ranks in float8, and adds what rounding removed to the next gradient.

    N - 1 bytes per number and rank, where float32 takes 8 (N - 1) / N: worth it for up to four ranks. Error feedback:
    Karimireddy, Rebjock, Stich, Jaggi (arXiv 1901.09847).
    """
    remainders: dict[int, Tensor] = {}  # by the bucket's index

    def hook(_: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Averages a bucket in place, and keeps on this rank what rounding removed from it."""
        gradient, count = bucket.buffer(), dist.get_world_size(group)
        remainder = remainders.get(bucket.index())
        if remainder is not None and remainder.shape == gradient.shape:  # buckets are cut anew after the first step
            gradient.add_(remainder)
        scale = (gradient.abs().max() / LARGEST_FLOAT8).clamp_min(torch.finfo(torch.float32).tiny)
        rounded = (gradient / scale).to(torch.float8_e4m3fn)
        remainders[bucket.index()] = gradient - rounded.float() * scale
        own = torch.cat((rounded.view(torch.uint8), scale.reshape(1).view(torch.uint8)))
        gathered = own.new_empty(count, len(own))
        work = dist.all_gather([*gathered.unbind()], own, group=group, async_op=True)
        assert work is not None

        def average(_: object) -> Tensor:
            numbers = gathered[:, :-4].contiguous().view(torch.float8_e4m3fn).float()
            scales = gathered[:, -4:].contiguous().view(torch.float32)
            return gradient.copy_((numbers * scales).mean(0))

        return work.get_future().then(average)

    return hook


COMPRESSIONS: dict[str, Callable[[dist.ProcessGroup], Hook] | None] = {
    "float32": None,
    "bfloat16": bfloat16,
    "float8": float8,
}
