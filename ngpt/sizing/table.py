"""The plan of a training run on several GPUs as a table."""

from collections.abc import Iterator, Sequence
from typing import Any

from ngpt.distributed.strategies import STRATEGIES
from ngpt.sizing.hardware import GPUS, Gpu
from ngpt.sizing.memory import rank_memory
from ngpt.sizing.step_time import step_time
from ngpt.training.config import TrainConfig

GB = 1e9


def plan_rows(config: TrainConfig, gpu: Gpu, counts: Sequence[int], *, mfu: float) -> list[dict[str, Any]]:
    """Returns memory and speed for each number of ranks, strategy, and with and without activation checkpointing."""
    return [
        _row(config, gpu, count, strategy, recompute, mfu)
        for count in counts
        if config.batch_size % count == 0
        for strategy in (("",) if count == 1 else STRATEGIES)
        for recompute in (False, True)
    ]


def _row(config: TrainConfig, gpu: Gpu, count: int, strategy: str, recompute: bool, mfu: float) -> dict[str, Any]:
    needed = rank_memory(config, count, strategy=strategy, recompute=recompute)
    time = step_time(config, gpu, count, strategy=strategy, recompute=recompute, mfu=mfu)
    names = ("weights", "gradients", "moments", "activations", "loss", "exchange")
    return {
        "gpus": count,
        "strategy": strategy,
        "activation_checkpointing": recompute,
        **{f"{name}_bytes": getattr(needed, name) for name in names},
        "evaluation_bytes": needed.evaluation,
        "total_bytes": needed.total,
        "fits": [name for name, each in GPUS.items() if needed.total <= each.usable],
        "sent_bytes": round(time.sent),
        "compute_ms": time.compute * 1000,
        "exposed_ms": time.exposed * 1000,
        "tokens_per_second": time.tokens_per_second,
        "efficiency": time.efficiency,
    }


def table_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields the rows as aligned text; memory in GB (10^9 bytes) of each GPU."""
    header = ("GPUs", "strategy", "recompute", "weights", "gradients", "moments", "activations", "loss", "exchange")
    cells = [[*header, "total", "sent", "tokens/s", "efficiency", "fits"]]
    for row in rows:
        names = ("weights", "gradients", "moments", "activations", "loss", "exchange", "total", "sent")
        sizes = [f"{row[f'{name}_bytes'] / GB:.2f}" for name in names]
        recompute = "blocks" if row["activation_checkpointing"] else "-"
        speed = [f"{row['tokens_per_second'] / 1000:,.1f}k", f"{row['efficiency']:.0%}"]
        cells.append(
            [str(row["gpus"]), row["strategy"] or "-", recompute, *sizes, *speed, ", ".join(row["fits"]) or "none"]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
