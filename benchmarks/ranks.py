"""Measures what it costs to train one model on several ranks of this CPU, which talk through gloo.

python -m benchmarks.ranks --seeds 3 --json

Each variant trains the same model on the same batches, in processes of its own, one variant after another for each
seed, so that a change of the machine's load meets all of them. All use as many cores: ranks have one thread each.
"""

import argparse
import inspect
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ngpt.config.base import ConfigError, build, flatten, override
from ngpt.data.dataset import prepare
from ngpt.distributed.join import joined_ranks
from ngpt.distributed.launch import launch, rank_command
from ngpt.distributed.ranks import ALONE, Ranks
from ngpt.sizing.step_time import messages
from ngpt.system.cli import ArgumentParser, add_set_option, run_command, whole_number
from ngpt.system.timing import print_metrics, speed_ratio
from ngpt.training.config import TrainConfig, read_config, resolved
from ngpt.training.evaluation import evaluate_run
from ngpt.training.loop import train_step
from ngpt.training.run import set_up

MODEL = Path(__file__).parents[1] / "experiments" / "models" / "1.3M.yaml"
SETTINGS = (f"model={MODEL}", "data.corpus=python-docs", "data.tokenizer=sentencepiece:2048", "steps=60", "device=cpu")
ONE, APART = "one-process", "apart"
VARIANTS: dict[str, dict[str, Any]] = {
    ONE: {},
    APART: {},
    "ddp": {},
    "ddp-bfloat16": {"distributed.gradient_dtype": "bfloat16"},
    "ddp-float8": {"distributed.gradient_dtype": "float8"},
    "fsdp": {"distributed.strategy": "fsdp"},
}
REFERENCE = "ddp"  # of the losses
WARMUP = 5  # steps that are neither timed nor counted
BYTES_ACKED = 120  # offset of tcpi_bytes_acked in struct tcp_info of linux/tcp.h


def compare_ranks(
    config: TrainConfig, *, ranks: int, seeds: int, variants: Sequence[str] = tuple(VARIANTS)
) -> dict[str, Any]:
    """Trains each variant for `config.steps` steps with each seed.

    Variants: `one-process` with as many threads as there are ranks; `apart`, where each rank trains a model of its own
    on its share of the batch and they exchange nothing; `ddp` in each `gradient_dtype`, and `fsdp`.

    Returns n_params and for each variant: step_ms (median over the seeds of a run's median step), efficiency (time of
    `one-process` over its own, the median over the seeds), and, except for `apart`, which trains on other batches,
    val_loss (mean) and loss_differences (validation loss in nats minus that of `ddp` with the same seed). Those that
    exchange something have waiting (share of a step that `apart` does not take, the median over the seeds), sent_bytes
    (by the first rank in a step: payload of TCP that has been acknowledged), ideal_bytes (of rings, as ngpt.sizing
    counts them) and overhead (their ratio). What refers to a variant that is left out is missing.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in range(seeds):
        for name in variants:
            share = {"batch_size": config.batch_size // ranks} if name == APART else {}
            found[name].append(_train(override(config, {"seed": seed, **VARIANTS[name], **share}), name, ranks))
    times = {name: [each["seconds"] for each in runs] for name, runs in found.items()}
    losses = {name: [each["val_loss"] for each in runs] for name, runs in found.items()}
    metrics: dict[str, Any] = {"ranks": ranks, "seeds": seeds, "steps": config.steps, "batch_size": config.batch_size}
    metrics |= {"optimizer": config.optim.name, "n_params": found[variants[0]][0]["n_params"]}
    for name in variants:
        own: dict[str, Any] = {"step_ms": 1000 * statistics.median(times[name])}
        if ONE in variants:
            own["efficiency"] = speed_ratio(times[name], times[ONE])
        if name != APART:
            own["val_loss"] = statistics.fmean(losses[name])
            if REFERENCE in variants:
                pairs = zip(losses[name], losses[REFERENCE], strict=True)
                own["loss_differences"] = [one - reference for one, reference in pairs]
        if name not in (ONE, APART):
            if APART in variants:
                own["waiting"] = 1 - 1 / speed_ratio(times[APART], times[name])
            changed = resolved(override(config, VARIANTS[name]))
            ideal = sum(each.sent(ranks) for each in messages(changed, ranks, strategy=changed.distributed.strategy))
            sent = statistics.median(each["sent_bytes"] for each in found[name])
            own |= {"sent_bytes": sent, "ideal_bytes": ideal, "overhead": sent / ideal}
        metrics[name] = own
    return metrics


def _train(config: TrainConfig, name: str, ranks: int) -> dict[str, Any]:
    """Trains a variant in new processes; returns what `_measure` found."""
    with tempfile.TemporaryDirectory(prefix="ngpt_benchmark") as folder:
        task = Path(folder) / "task.json"
        task.write_text(json.dumps({"config": flatten(config), "variant": name, "cores": ranks}))
        command = rank_command("benchmarks.ranks", ["--task", str(task)])
        if code := launch(lambda _: command, 1 if name == ONE else ranks):
            raise ConfigError(f"{name}, seed {config.seed}: a process has ended with code {code}; see above")
        return json.loads((Path(folder) / "measured.json").read_text())


def _run_task(task: Path) -> int:
    """What each process of a variant does."""
    given = json.loads(task.read_text())
    config, name = resolved(build(TrainConfig, given["config"])), given["variant"]
    torch.set_num_threads(given["cores"] if name == ONE else 1)
    own = task.parent / os.environ["RANK"]
    if name == APART:
        measured = _measure(config, own, ALONE)
    else:
        with joined_ranks() as ranks:
            measured = _measure(config, own, ranks)
    if os.environ["RANK"] == "0":
        (task.parent / "measured.json").write_text(json.dumps(measured))
    return 0


def _measure(config: TrainConfig, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Trains for all steps, and then evaluates. Each rank does the same, since all take part in each exchange."""
    run = set_up(config, folder, resume=None, dataset=None, ranks=ranks)
    seconds: list[float] = []
    sent_before = 0
    for step in range(config.steps):
        if step == WARMUP:
            sent_before = _sent_bytes()
        start = time.perf_counter()
        train_step(run)  # ends with the numbers of all ranks
        seconds.append(time.perf_counter() - start)
    sent = (_sent_bytes() - sent_before) / (config.steps - WARMUP)
    evaluate_run(run, last=True)
    n_params = sum(each.numel() for each in run.model.parameters())
    median = statistics.median(seconds[WARMUP:])
    return {"seconds": median, "sent_bytes": sent, "n_params": n_params, "val_loss": run.state.last_eval["val_loss"]}


def _sent_bytes() -> int:
    """The bytes that the other ends of this process's TCP connections have acknowledged, as Linux counts them."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                is_tcp = connection.type == socket.SOCK_STREAM
                if is_tcp and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
                    total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
        except FileNotFoundError:
            continue  # the descriptor with which the folder was listed
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.ranks",
        description=f"{__doc__}\n{inspect.getdoc(compare_ranks)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_set_option(parser, help=f"change settings; the default is that of ngpt.train with {' '.join(SETTINGS[1:])}")
    parser.add_argument("--ranks", type=whole_number(2, 64), default=2, help="each on a core; default 2")
    parser.add_argument("--seeds", type=whole_number(1, 100), default=3, help="rounds of all variants; default 3")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)  # of a process that this command starts
    options = parser.parse_args(arguments)
    return run_command(lambda: _run_task(options.task) if options.task else _compare(options))


def _compare(options: argparse.Namespace) -> int:
    config = read_config(None, [*SETTINGS, *options.set])
    if config.steps <= WARMUP:
        raise ConfigError(f"steps must be above {WARMUP}, which warm up, got {config.steps}")
    if config.batch_size % options.ranks:
        raise ConfigError(f"batch_size must be a multiple of --ranks {options.ranks}, got {config.batch_size}")
    prepare(config.data, log=lambda line: None)
    how = {"ranks": options.ranks, "seeds": options.seeds, "variants": list(dict.fromkeys(options.variants))}
    print_metrics(compare_ranks(config, **how), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
