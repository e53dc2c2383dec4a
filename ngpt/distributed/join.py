"""Joins the ranks that torchrun, or `--ranks`, has started, as its environment variables say.

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT are those of torch.distributed.run.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ngpt.config.base import ConfigError
from ngpt.distributed.ranks import ALONE, EXIT_RANK_LOST, ProcessRanks, RankLost, Ranks
from ngpt.system import gpus
from ngpt.system.device import pick_device

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_VARIABLE = "NGPT_LAUNCHER"  # the process id of `--ranks`
TIMEOUT = timedelta(minutes=10)  # without a sign of another rank; longer than a compilation or a save


def is_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process has been started as one of several ranks."""
    return all(environment.get(name) for name in VARIABLES) and environment["WORLD_SIZE"] != "1"


@contextlib.contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Context manager: the ranks of this process, `ALONE` if it has not been started as one of several.

    Raises RankLost if another rank ends while this one waits for it.
    """
    if not is_rank():
        yield ALONE
        return
    if launcher := os.environ.get(LAUNCHER_VARIABLE):
        threading.Thread(target=_end_with, args=(int(launcher),), daemon=True, name="launcher").start()
    with process_group() as ranks:
        yield ranks


@contextlib.contextmanager
def process_group(*, halvings: int | None = None, **meeting: Any) -> Iterator[ProcessRanks]:
    """Context manager: the ranks that meet as the environment variables say, or by other arguments of torch.

    Raises RankLost if another rank ends while this one waits for it.

    Args:
        halvings: of the micro-batch that the run starts with; None: as the environment says.
        meeting: arguments of `init_process_group` in place of the variables: `rank`, `world_size` and `store`.
    """
    rank = meeting.get("rank", os.environ.get("RANK"))
    try:
        dist.init_process_group(timeout=TIMEOUT, **meeting)  # gloo for CPUs, and NCCL for GPUs once they are used
        control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(control, dist.ProcessGroup) and dist.group.WORLD is not None
        yield ProcessRanks(dist.group.WORLD, control, halvings=halvings)
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise RankLost(f"rank {rank} has lost another rank") from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end_with(launcher: int) -> None:
    """Ends this process when the command that has started it is gone, and so cannot end it."""
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(EXIT_RANK_LOST)


def share_devices(device: str) -> None:
    """Gives this rank a GPU of its own, or its part of the cores of this host.

    Raises ConfigError if the host has more ranks than GPUs.
    """
    local, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if pick_device(device).type == "cuda":
        if count > (available := gpus.count()):
            raise ConfigError(f"{count} ranks need a GPU each, and this host has {available}")
        gpus.use(local)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
