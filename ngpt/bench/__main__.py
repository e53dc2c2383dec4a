"""`python -m ngpt.bench NAME`: see ngpt/bench/__init__.py."""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ngpt.bench
from ngpt.bench import parts, saving
from ngpt.bench.peers import MODES, against_peer
from ngpt.config.base import ConfigError
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.ensemble.throughput import vectorised
from ngpt.system.device import DTYPES, pick_device
from ngpt.system.timing import print_figures
from ngpt.training.config import TrainConfig, read_config
from ngpt.training.throughput import step

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": step,
    "loss": parts.loss,
    "residual": parts.residual,
    "optimizer": parts.optimizer,
    "projection": parts.projection,
    "loader": parts.loader,
    "generate": parts.generate,
    "checkpoint": saving.checkpoint,
    "vectorised": vectorised,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        figures = measured(options)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return 2
    print_figures(figures, as_json=options.json)
    return 0


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the benchmark that the command line asks for.

    Raises:
        ConfigError: a wrong setting, or an option that this benchmark does not have.
    """
    given = [f"dtype={options.dtype}"] if options.dtype else []
    config: TrainConfig = read_config(options.config, [*options.set, *given, *(["compile=true"] * options.compile)])
    pick_device(config.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget = {} if options.seconds is None else {"seconds": options.seconds}
    if options.peer is not None:
        if options.name != "step":
            raise ConfigError(f"--peer belongs to the benchmark step, not to {options.name}")
        return against_peer(config, options.peer.expanduser().absolute(), modes=options.modes, **budget)
    if budget and options.name == "step":
        raise ConfigError("--seconds belongs to the other benchmarks, or to step with --peer: step counts its steps")
    return BENCHMARKS[options.name](config, **budget)


def _parser() -> argparse.ArgumentParser:
    documented = BENCHMARKS | {"step --peer": against_peer}
    described = [
        f"  {name}: {(inspect.getdoc(function) or '').partition('Raises:')[0].strip()}"
        for name, function in documented.items()
    ]
    everywhere = "Every benchmark also returns device, dtype and threads."
    parser = argparse.ArgumentParser(
        prog="python -m ngpt.bench",
        description="\n\n".join([inspect.getdoc(ngpt.bench) or "", *described, everywhere]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--config", type=Path, help="YAML file of settings, as ngpt.train has it")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="change settings")
    parser.add_argument("--dtype", choices=DTYPES, help="short for --set dtype=...")
    parser.add_argument("--compile", action="store_true", help="short for --set compile=true")
    parser.add_argument("--threads", type=int, help="CPU threads; default is torch's")
    parser.add_argument("--seconds", type=float, help="how long about to measure, after the warm-up")
    parser.add_argument("--peer", type=Path, metavar="MODEL.PY", help="step: take turns with nanoGPT's or nGPT's")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="step --peer: default both")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())
