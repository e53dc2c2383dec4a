"""Trains one model.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --config model.yaml --out runs/first --resume latest
"""

import argparse
import json
import sys
from collections.abc import Generator
from pathlib import Path

from ngpt.config.base import override
from ngpt.model.norm import NORM_MODES
from ngpt.system.cli import EXIT_UNSUCCESSFUL, add_set_option, run_command
from ngpt.training.config import TrainConfig, read_config
from ngpt.training.loop import train
from ngpt.training.run import RunResult
from ngpt.training.state import Metrics
from ngpt.training.tracker import resolve_tracker

__all__ = ["TrainConfig", "train"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ngpt.train", description="Train one model.")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    add_set_option(parser)
    modes = f"what divides the residual's step: {', '.join(NORM_MODES)}; short for --set norm_mode=..."
    parser.add_argument("--norm-mode", "--norm_mode", metavar="MODE", help=modes)
    parser.add_argument("--out", type=Path, default=Path("runs/default"), help="folder for metrics and checkpoints")
    parser.add_argument("--resume", choices=["latest"], help="continue from the newest intact checkpoint in --out")
    options = parser.parse_args(arguments)
    return run_command(lambda: _train(options), path=options.out)


def _train(options: argparse.Namespace) -> int:
    config = read_config(options.config, options.set)
    if options.norm_mode is not None:
        config = override(config, {"model.norm_mode": options.norm_mode})
    config = config.model_copy(update={"tracker": resolve_tracker(config.tracker, options.out)})
    result = print_progress(train(config, options.out, resume=options.resume))
    print(json.dumps({"status": result.status} | result.metrics, indent=1, allow_nan=False))
    return 0 if result.status == "finished" else EXIT_UNSUCCESSFUL


def print_progress(run: Generator[Metrics, None, RunResult]) -> RunResult:
    """Trains to the end, and prints a line to stderr for each evaluation."""
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
