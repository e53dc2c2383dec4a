"""Trains one model.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --config model.yaml --out runs/first --resume latest
"""

import argparse
import json
import sys
from collections.abc import Generator
from pathlib import Path

from ngpt.config.base import ConfigError, override
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.model.norm import NORM_MODES
from ngpt.training.config import TrainConfig, read_config
from ngpt.training.loop import train
from ngpt.training.run import RunResult
from ngpt.training.state import Metrics
from ngpt.training.tracker import settled

__all__ = ["TrainConfig", "train"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ngpt.train", description="Train one model.")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings")
    modes = f"what divides the residual's step: {', '.join(NORM_MODES)}; short for --set norm_mode=..."
    parser.add_argument("--norm-mode", "--norm_mode", metavar="MODE", help=modes)
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder for metrics and checkpoints")
    parser.add_argument("--resume", choices=["latest"], help="continue from the newest intact checkpoint in --out")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.set)
        if options.norm_mode is not None:
            config = override(config, {"model.norm_mode": options.norm_mode})
        config = config.model_copy(update={"tracker": settled(config.tracker, options.out)})
        run = train(config, options.out, resume=options.resume)
        result = print_progress(run)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 74
    print(json.dumps({"status": result.status} | result.metrics, indent=1, allow_nan=False))
    return 0 if result.status == "finished" else 4


def print_progress(run: Generator[Metrics, None, RunResult]) -> RunResult:
    """Runs to the end with a line on stderr per evaluation."""
    while True:
        try:
            metrics = next(run)
        except StopIteration as stop:
            return stop.value
        shown = {name: metrics[name] for name in ("train_loss", "val_loss", "tokens_per_second")}
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        print(f"step {metrics['step']}  {numbers}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
