"""How the ranks of a run share one model.

`STRATEGIES` holds functions (model, ranks, cfg) -> replica. Each imports its own part of torch.distributed, which takes
longer than the rest of this package; most runs have one device and need none of it.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated

import torch

from ngpt.config.base import Config, ConfigError, Problem, added_setting, one_of, runtime_setting
from ngpt.distributed.compression import COMPRESSIONS
from ngpt.distributed.ranks import ProcessRanks, Ranks
from ngpt.distributed.replica import Replica
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT


def ddp(model: GPT, ranks: ProcessRanks, cfg: "DistributedConfig") -> Replica:
    """Every rank has the whole model; gradients are averaged."""
    from ngpt.distributed.data_parallel import DataParallelReplica

    return DataParallelReplica(model, ranks, gradient_dtype=cfg.gradient_dtype)


def fsdp(model: GPT, ranks: ProcessRanks, cfg: "DistributedConfig") -> Replica:
    """Every rank has a part of each weight and of its optimizer state."""
    from ngpt.distributed.sharded import ShardedReplica

    if problem := next(problems_of(cfg, ranks.count), None):
        raise ConfigError(problem.message)
    if model.compiled:
        model.compile_blocks()  # the weights of the next one are gathered meanwhile
    return ShardedReplica(model, ranks)


STRATEGIES = {"ddp": ddp, "fsdp": fsdp}


class DistributedConfig(Config):
    """How a run uses several devices; without effect on one."""

    strategy: Annotated[str, one_of(STRATEGIES, "strategy")] = runtime_setting("ddp")
    """How ranks share the model: with `ddp` each has all of it, with `fsdp` a part of each weight."""
    gradient_dtype: Annotated[str, one_of(COMPRESSIONS, "gradient dtype")] = added_setting("float32")
    """Precision in which ranks exchange gradients, with `ddp`."""


def problems_of(cfg: DistributedConfig, count: int) -> Iterator[Problem]:
    """Yields what keeps `count` ranks from training with these settings, at the setting to change."""
    if count == 1 and cfg.gradient_dtype != "float32":
        yield Problem(("distributed.gradient_dtype",), "is for several ranks, and this run has one")
    if count == 1 or cfg.strategy != "fsdp":
        return
    if cfg.gradient_dtype != "float32":
        text = f"strategy fsdp exchanges gradients in float32, not in {cfg.gradient_dtype}; use ddp for that"
        yield Problem(("distributed.gradient_dtype",), text)


def model_problem(cfg: DistributedConfig, model: ModelConfig, count: int) -> str | None:
    """Why `count` ranks cannot share a model of this shape, or None; its vocabulary does not matter."""
    return _sharding_problem(model.model_copy(update={"vocab_size": 1}), count) if cfg.strategy == "fsdp" else None


@lru_cache(maxsize=1000)
def _sharding_problem(model: ModelConfig, count: int) -> str | None:
    from ngpt.distributed.sharded import ShardedReplica

    try:
        with torch.device("meta"):  # allocates nothing
            ShardedReplica.check_divisible(GPT(model), count)
    except ConfigError as error:
        return str(error)
    return None


def replicate(model: GPT, ranks: Ranks, cfg: DistributedConfig) -> Replica:
    """Returns what a rank trains of the model: all of it, if there is only one rank."""
    return STRATEGIES[cfg.strategy](model, ranks, cfg) if isinstance(ranks, ProcessRanks) else Replica(model, ranks)
