"""What one GPU reaches, in one command of under ten minutes.

Each part runs in a process of its own, with a time limit: one that fails, or is killed, says so in its place, and the
others go on. The shapes are those of experiments/: the production configuration of the seeds (52.8M parameters,
48 x 128 tokens), the 0.5B model of the paper (8 x 1024), and the seeds' 39 experiments. The text is Python's own
documentation, so that no network is needed; the speed does not depend on it.
"""

import contextlib
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
from ngpt.config.base import ConfigError, unknown
from ngpt.data.dataset import prepare
from ngpt.training.config import TrainConfig, read_config, resolved
from ngpt.training.throughput import measure_step
from tune.bench.campaigns import run
from tune.bench.packing import packing_of
from tune.campaign import load_campaign
from tune.report.wording import packing_fact
from tune.spec.schema import Campaign

Figures = dict[str, Any]

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
TEXT = ("data.corpus=python-docs", "data.tokenizer=sentencepiece:2048")
BEST = ("batch_size=48", "logit_scale=15", "project_every=7")  # seed 002, "Production Configuration"
SMALL = ("n_layer=2", "n_head=2", "n_embd=32", "block_size=16", "vocab_size=null", "eval_tokens=128", "compile=false")
TOTAL = 590.0  # seconds for all parts


@dataclass(frozen=True)
class Part:
    """One part: how it is measured, for how many seconds at most, and what one of its figures has to be."""

    measure: Callable[[bool], Figures]  # whether with tiny shapes
    limit: float
    figure: str
    target: float
    at_most: bool = False  # whether the target is an upper bound

    def meets(self, figures: Mapping[str, Any]) -> bool:
        """Whether `figure`, among all that was measured, is on the right side of `target`."""
        value = figures[self.figure]
        return value <= self.target if self.at_most else value >= self.target


def production(tiny: bool) -> TrainConfig:
    """The seeds' production configuration, from phase4.yaml: compiled, bfloat16."""
    given = (*TEXT, *BEST, "compile=true", *(SMALL if tiny else ()))
    return load_campaign(_shipped("phase4.yaml"), given).base


def half_billion(tiny: bool) -> TrainConfig:
    """The 0.5B model at 8 x 1024 tokens: compiled, bfloat16."""
    model = f"model={_shipped('models/0.5B.yaml')}"
    given = (model, *TEXT, "batch_size=8", "dtype=bfloat16", "compile=true", *(SMALL if tiny else ()))
    return read_config(None, list(given))


def experiments(tiny: bool) -> Campaign:
    """The seeds' 39 experiments of 200 steps, not compiled: that would take longer than they do."""
    return load_campaign(_shipped("seeds39.yaml"), (*TEXT, *((*SMALL, "steps=2") if tiny else ())))


def measure_single(tiny: bool) -> Figures:
    """One trial of the production configuration."""
    return measure_step(_ready(production(tiny)), warmup=10, steps=10 if tiny else 200)


def measure_packed(tiny: bool) -> Figures:
    """Several trials of it at once."""
    return packing_of(_ready(production(tiny)), **({"seconds": 0.1} if tiny else {}))


def measure_half_billion(tiny: bool) -> Figures:
    """One trial of the 0.5B model."""
    return measure_step(_ready(half_billion(tiny)), warmup=5, steps=5 if tiny else 30)


def measure_projection(tiny: bool) -> Figures:
    """A projection after every step of the production configuration."""
    return time_projection(_ready(production(tiny)), seconds=0.1 if tiny else 10.0)


def measure_experiments(tiny: bool) -> Figures:
    """The 39 experiments as a campaign, from the call to the last record."""
    campaign = experiments(tiny)
    called = time.time()
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        times, summary = run(campaign, Path(folder) / "results")
    seconds = time.time() - called
    packing = summary["packing"] and packing_fact(summary["packing"])
    return {"seconds": seconds, "trials": summary["trials"], "packing": packing, "times": times}


PARTS: dict[str, Part] = {
    "single": Part(measure_single, 120, "tokens_per_second", 1.2e6),
    "packed": Part(measure_packed, 120, "tokens_per_second", 1.6e6),
    "half_billion": Part(measure_half_billion, 150, "mfu", 0.45),
    "projection": Part(measure_projection, 60, "share", 0.03, at_most=True),
    "experiments": Part(measure_experiments, 240, "seconds", 240, at_most=True),
}


def gpu(*, part: str | None = None, tiny: bool = False) -> Figures:
    """What this machine's GPU reaches with the shapes of experiments/, in under ten minutes; on stderr, how far it is.

    part: only this one, in this process. tiny: with shapes that take a CPU seconds, to see that it runs. By part:
    single (52.8M parameters, 48 x 128 tokens, one trial) and half_billion (0.5B, 8 x 1024): what `ngpt.bench step`
    returns; packed: what `packing` returns; projection: what `ngpt.bench projection` returns; experiments (the seeds'
    39 at 200 steps as a campaign): seconds, trials by status, packing, times. A part that failed has an `error`
    instead. targets has, by part: figure, value, target, at_most, met. seconds: of everything.
    """
    if part is not None:
        if part not in PARTS:
            raise ConfigError(unknown("part", part, PARTS))
        return PARTS[part].measure(tiny)
    begun = time.monotonic()
    found: Figures = {}
    for number, name in enumerate(PARTS, 1):
        left = TOTAL - (time.monotonic() - begun)
        _tell(f"gpu {number}/{len(PARTS)}: {name} ...")
        start = time.monotonic()
        found[name] = _alone(name, tiny, limit=min(PARTS[name].limit, left))
        _tell(f"gpu {number}/{len(PARTS)}: {name} {_outcome(name, found[name])}, {time.monotonic() - start:.0f} s")
    return found | {"targets": _targets(found), "seconds": time.monotonic() - begun}


def _ready(config: TrainConfig) -> TrainConfig:
    """The config with its corpus prepared and its vocabulary known."""
    prepare(config.data, log=lambda line: None)
    return resolved(config)


def _shipped(name: str) -> Path:
    if not (path := EXPERIMENTS / name).is_file():
        raise ConfigError(f"{path} is not there: this benchmark runs in a checkout of the project")
    return path


def _alone(name: str, tiny: bool, *, limit: float) -> Figures:
    """A part in a process of its own, whose memory is free afterwards and whose death is not ours."""
    if limit <= 0:
        return {"error": "no time was left for it"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(_command(name, tiny), stdout=out, stderr=complaints)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        out.seek(0)
        complaints.seek(0)
        said, complained = out.read().decode(), complaints.read().decode(errors="replace")
    if code is None:
        return {"error": f"not over after {limit:.0f} s", "stderr": complained[-2000:]}
    if code:
        return {"error": f"exit code {code}", "stderr": complained[-2000:]}
    return json.loads(said)


def _command(name: str, tiny: bool) -> list[str]:
    return [sys.executable, "-m", "tune.bench", "gpu", "--part", name, "--json", *(["--tiny"] * tiny)]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with everything that it has started, if it is still there."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
    process.wait()


def _targets(found: Mapping[str, Figures]) -> Figures:
    rows = {}
    for name, part in PARTS.items():
        value = found[name].get(part.figure)
        met = value is not None and part.meets(found[name])
        rows[name] = {"figure": part.figure, "value": value, "target": part.target, "at_most": part.at_most, "met": met}
    return rows


def _outcome(name: str, figures: Figures) -> str:
    """For people: the figure and its target, or why there is none."""
    if "error" in figures:
        return f"failed ({figures['error']})"
    part = PARTS[name]
    asked = f"{'at most' if part.at_most else 'at least'} {part.target:.4g}"
    return f"{part.figure} {figures[part.figure]:.4g} ({asked}: {'met' if part.meets(figures) else 'not met'})"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
