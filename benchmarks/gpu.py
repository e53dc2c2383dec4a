"""Benchmarks one GPU in under ten minutes: `python -m benchmarks.gpu --json`.

Each part runs in its own process with a time limit; if one fails or is killed, its entry is an error and the others
continue. The shapes are those of experiments/: the production configuration of the source reports (52.8M parameters,
48 x 128 tokens), the 0.5B model of the paper (8 x 1024), and the 39 experiments of the source reports. The corpus is
the Python documentation, which needs no download; it does not affect the speed.
"""

import argparse
import contextlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ngpt.bench.parts import projection as time_projection
from ngpt.data.dataset import prepare
from ngpt.system.cli import ArgumentParser, run_command
from ngpt.system.timing import print_metrics
from ngpt.training.config import TrainConfig, read_config, resolved
from ngpt.training.throughput import measure_step
from tune.bench.campaigns import run_timed
from tune.bench.packing import packing_of
from tune.campaign import load_campaign
from tune.report.wording import packing_fact
from tune.spec.schema import Campaign

BenchMetrics = dict[str, Any]

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
TEXT = ("data.corpus=python-docs", "data.tokenizer=sentencepiece:2048")
PRODUCTION = ("batch_size=48", "logit_scale=15", "project_every=7")  # source report 002, "Production Configuration"
TINY = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=16", "vocab_size=null", "eval_tokens=128", "compile=false")
TIME_LIMIT = 590.0  # seconds for all parts


@dataclass(frozen=True)
class Part:
    """One part of the benchmark, its time limit in seconds, and the target of one of its metrics."""

    measure: Callable[[bool], BenchMetrics]  # the argument: use tiny shapes
    limit: float
    metric: str
    target: float
    is_maximum: bool = False  # whether the target is an upper bound

    def meets(self, metrics: Mapping[str, Any]) -> bool:
        """Whether the figure reaches the target."""
        value = metrics[self.metric]
        return value <= self.target if self.is_maximum else value >= self.target


def production(tiny: bool) -> TrainConfig:
    """The production configuration of the source reports, from phase4.yaml: compiled, bfloat16."""
    assignments = (*TEXT, *PRODUCTION, "compile=true", *(TINY if tiny else ()))
    return load_campaign(_experiment("phase4.yaml"), assignments).base


def half_billion(tiny: bool) -> TrainConfig:
    """The 0.5B model at 8 x 1024 tokens: compiled, bfloat16."""
    model = f"model={_experiment('models/0.5B.yaml')}"
    assignments = (model, *TEXT, "batch_size=8", "dtype=bfloat16", "compile=true", *(TINY if tiny else ()))
    return read_config(None, list(assignments))


def experiments(tiny: bool) -> Campaign:
    """The 39 experiments of 200 steps, uncompiled, because compilation would take longer than training."""
    return load_campaign(_experiment("seeds39.yaml"), (*TEXT, *((*TINY, "steps=2") if tiny else ())))


def measure_single(tiny: bool) -> BenchMetrics:
    """One trial of the production configuration."""
    return measure_step(_prepared(production(tiny)), warmup=10, steps=10 if tiny else 200)


def measure_packed(tiny: bool) -> BenchMetrics:
    """Several concurrent trials of the production configuration."""
    return packing_of(_prepared(production(tiny)), **({"seconds": 0.1} if tiny else {}))


def measure_half_billion(tiny: bool) -> BenchMetrics:
    """One trial of the 0.5B model."""
    return measure_step(_prepared(half_billion(tiny)), warmup=5, steps=5 if tiny else 30)


def measure_projection(tiny: bool) -> BenchMetrics:
    """A projection after every step of the production configuration."""
    return time_projection(_prepared(production(tiny)), seconds=0.1 if tiny else 10.0)


def measure_experiments(tiny: bool) -> BenchMetrics:
    """The 39 experiments as a campaign, from start-up to the last record."""
    campaign = experiments(tiny)
    start = time.time()
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        times, summary = run_timed(campaign, Path(folder) / "results")
    seconds = time.time() - start
    packing = summary.packing and packing_fact(summary.packing)
    return {"seconds": seconds, "trials": vars(summary.trials), "packing": packing, "times": times}


PARTS: dict[str, Part] = {
    "single": Part(measure_single, 120, "tokens_per_second", 1.2e6),
    "packed": Part(measure_packed, 120, "tokens_per_second", 1.6e6),
    "half_billion": Part(measure_half_billion, 150, "mfu", 0.45),
    "projection": Part(measure_projection, 60, "share", 0.03, is_maximum=True),
    "experiments": Part(measure_experiments, 240, "seconds", 240, is_maximum=True),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"{__doc__}\n{inspect.getdoc(measure_all)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument("--part", choices=PARTS, help="measure only this part, in this process")
    parser.add_argument("--tiny", action="store_true", help="use shapes that take seconds on a CPU, as a test")
    options = parser.parse_args(arguments)

    def run_benchmark() -> int:
        part = PARTS.get(options.part)
        metrics = part.measure(options.tiny) if part else measure_all(tiny=options.tiny)
        print_metrics(metrics, as_json=options.json)
        return 0

    return run_command(run_benchmark)


def measure_all(*, tiny: bool = False) -> BenchMetrics:
    """BenchMetrics of all parts, by part; progress and targets go to stderr.

    single (52.8M parameters, 48 x 128 tokens, one trial) and half_billion (0.5B, 8 x 1024): as `ngpt.bench step`.
    packed: as `tune.bench packing`. projection: as `ngpt.bench projection`. experiments (39 at 200 steps, as a
    campaign): seconds, trials by status, packing, times. A part that failed has an `error` instead. targets, by part:
    figure, value, target, at_most, met. seconds: of everything.
    """
    start = time.monotonic()
    metrics: BenchMetrics = {}
    for number, name in enumerate(PARTS, 1):
        part_start = time.monotonic()
        _print_line(f"gpu {number}/{len(PARTS)}: {name} ...")
        limit = min(PARTS[name].limit, TIME_LIMIT - (part_start - start))
        metrics[name] = _run_part(name, tiny, limit=limit)
        seconds = time.monotonic() - part_start
        _print_line(f"gpu {number}/{len(PARTS)}: {name} {_outcome(name, metrics[name])}, {seconds:.0f} s")
    return metrics | {"targets": _targets(metrics), "seconds": time.monotonic() - start}


def _prepared(config: TrainConfig) -> TrainConfig:
    """The config with its corpus prepared and its vocabulary known."""
    prepare(config.data, log=lambda line: None)
    return resolved(config)


def _experiment(name: str) -> Path:
    return EXPERIMENTS / name


def _run_part(name: str, tiny: bool, *, limit: float) -> BenchMetrics:
    """Measures a part in its own process, so that its memory is freed and a crash does not stop the benchmark."""
    if limit <= 0:
        return {"error": "no time was left for it"}
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(_command(name, tiny), stdout=stdout, stderr=stderr)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _kill(process)
        stdout.seek(0)
        stderr.seek(0)
        metrics, errors = stdout.read().decode(), stderr.read().decode(errors="replace")
    if code is None:
        return {"error": f"timed out after {limit:.0f} s", "stderr": errors[-2000:]}
    if code:
        return {"error": f"exit code {code}", "stderr": errors[-2000:]}
    return json.loads(metrics)


def _command(name: str, tiny: bool) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--json", *(["--tiny"] if tiny else [])]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


def _targets(metrics: Mapping[str, BenchMetrics]) -> BenchMetrics:
    rows = {}
    for name, part in PARTS.items():
        value = metrics[name].get(part.metric)
        met = value is not None and part.meets(metrics[name])
        rows[name] = {
            "figure": part.metric,
            "value": value,
            "target": part.target,
            "at_most": part.is_maximum,
            "met": met,
        }
    return rows


def _outcome(name: str, metrics: BenchMetrics) -> str:
    """Describes the metric and its target, or the error, in one line."""
    if "error" in metrics:
        return f"failed ({metrics['error']})"
    part = PARTS[name]
    target = f"{'at most' if part.is_maximum else 'at least'} {part.target:.4g}"
    return f"{part.metric} {metrics[part.metric]:.4g} ({target}: {'met' if part.meets(metrics) else 'not met'})"


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
