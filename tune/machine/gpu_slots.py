"""Spreads the workers of a private Ray over the GPUs before two of them share one.

Ray counts shares of GPUs but fills one GPU before it uses the next: two trials of half a GPU each end up on the same
one. So each worker takes the first free of numbered slots, and slot `n` is on GPU `n` modulo the number of GPUs. A slot
is a locked file, and the kernel unlocks it when the worker dies.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ngpt.system import gpus

CLAIM_TIMEOUT = 120.0  # seconds for a worker that Ray has ended to exit
RETRY_SECONDS = 0.1


@dataclass(frozen=True)
class GpuSlots:
    """The slots of a campaign on this machine, one for each worker."""

    folder: Path
    gpus: Sequence[str]  # named as in CUDA_VISIBLE_DEVICES
    workers: int

    def gpu(self, slot: int) -> str:
        """The GPU of a slot."""
        return self.gpus[slot % len(self.gpus)]

    def workers_on(self, gpu: str) -> int:
        """The number of workers that share a GPU if all workers run."""
        return sum(self.gpu(slot) == gpu for slot in range(self.workers))


class GpuSlot:
    """The slot of this process, held until the process ends."""

    def __init__(self, slots: GpuSlots, number: int, lock: FileLock) -> None:
        self.gpu, self.workers = slots.gpu(number), slots.workers_on(slots.gpu(number))
        self._lock = lock


def claim_slot(slots: GpuSlots) -> GpuSlot:
    """Takes the first free slot and makes its GPU the only one that this process sees.

    Raises:
        TimeoutError: all slots stay taken, by processes that should have ended.
    """
    slots.folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + CLAIM_TIMEOUT
    while True:
        for number in range(slots.workers):
            lock = FileLock(slots.folder / f"slot-{number}.lock")
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            slot = GpuSlot(slots, number, lock)
            gpus.choose(slot.gpu)
            return slot
        if time.monotonic() > deadline:
            raise TimeoutError(f"all {slots.workers} places on the GPUs are held by processes that have not exited")
        time.sleep(RETRY_SECONDS)
