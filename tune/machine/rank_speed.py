"""Times steps of trials that several ranks train together, in processes of this host."""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from ngpt.code.plugins import Source, loaded_sources
from ngpt.config.base import UserError
from ngpt.distributed.join import process_group
from ngpt.distributed.network import INTERFACE_VARIABLE, LOOPBACK, interface_to, open_store
from ngpt.distributed.ranks import RankLost
from ngpt.plugins.load import load_sources
from ngpt.system import gpus
from ngpt.system.device import pick_device
from ngpt.training.config import TrainConfig
from ngpt.training.throughput import measure_step
from tune.machine.spawn import hide_main_module

TIMEOUT = 300.0  # seconds for a shape: to import torch, compile, warm up and take its steps
Answer = list[float] | str  # tokens per second of each shape, or an error


class RanksNotMeasured(UserError):
    """No speed can be measured on several ranks; the message says why."""


def measure_on_ranks(configs: Sequence[TrainConfig], count: int, *, threads: int) -> list[float]:
    """Times real training steps of each config on `count` ranks of this host; returns their tokens per second.

    A step ends when all ranks have it. The strategy is that of each config, and every rank has `threads` threads.

    Raises:
        RanksNotMeasured: a rank fails, dies or hangs.
    """
    store, context = open_store(), multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    processes, pipes = [], list[Connection]()
    try:
        for index in range(count):
            ours, theirs = context.Pipe(duplex=False)
            pipes.append(ours)
            arguments = (index, count, store.port, configs, threads, loaded_sources(), theirs)
            process = context.Process(target=_measure_as_rank, args=arguments, daemon=True)
            with hide_main_module():
                process.start()
            processes.append(process)
            theirs.close()
        answer = _answer(pipes, time.monotonic() + TIMEOUT * len(configs))
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()
    if isinstance(answer, str):
        raise RanksNotMeasured(f"--measure: {answer}")
    return answer


def _answer(pipes: Sequence[Connection], deadline: float) -> Answer:
    """Waits for the speeds, which all ranks send, or for the first error; ranks that only lost another send nothing."""
    waiting = list(pipes)
    while waiting:
        if not (ready := wait(waiting, max(0.0, deadline - time.monotonic()))):
            return f"the steps of {len(pipes)} ranks have not ended in time"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                return pipe.recv()
            except EOFError:
                waiting.remove(pipe)
    return "a rank has died"


def _measure_as_rank(
    index: int,
    count: int,
    port: int,
    configs: Sequence[TrainConfig],
    threads: int,
    plugins: Sequence[Source],
    pipe: Connection,
) -> None:
    """Main function of the process of a rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    try:
        load_sources(plugins)
        torch.set_num_threads(threads)
        if gpus.is_gpu(pick_device(configs[0].device)):
            gpus.use(index)
        if interface := interface_to(LOOPBACK):
            os.environ.setdefault(INTERFACE_VARIABLE, interface)
        with process_group(halvings=0, store=TCPStore(LOOPBACK, port), rank=index, world_size=count) as ranks:
            found = [measure_step(config, warmup=3, steps=10, ranks=ranks) for config in configs]
            pipe.send([float(each["tokens_per_second"]) for each in found])
            ranks.gather(None)  # none ends before all have sent
    except RankLost:
        return
    except Exception as error:
        pipe.send(f"rank {index}: {traceback.format_exception_only(error)[-1].strip()}")
