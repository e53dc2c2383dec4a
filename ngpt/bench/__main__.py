"""The command `python -m ngpt.bench NAME`."""

import argparse
import inspect
import sys
from collections.abc import Callable
from typing import Any

import ngpt.bench
from ngpt.bench import parts
from ngpt.bench.checkpoints import checkpoint
from ngpt.bench.ensembles import vectorised
from ngpt.bench.options import add_config_arguments, config_of
from ngpt.config.base import ConfigError
from ngpt.data.tokens.shards import CorruptShardError
from ngpt.system.timing import print_figures
from ngpt.training.throughput import measure_step

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": measure_step,
    "loss": parts.loss,
    "residual": parts.residual,
    "optimizer": parts.optimizer,
    "projection": parts.projection,
    "loader": parts.loader,
    "generate": parts.generate,
    "checkpoint": checkpoint,
    "vectorised": vectorised,
}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        figures = run_benchmark(options)
    except (ConfigError, CorruptShardError) as error:
        print(error, file=sys.stderr)
        return 2
    print_figures(figures, as_json=options.json)
    return 0


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of the benchmark that the command line asks for.

    Raises:
        ConfigError: a setting is wrong, or this benchmark does not have one of the options.
    """
    config = config_of(options)
    if options.seconds is None:
        return BENCHMARKS[options.name](config)
    if options.name == "step":
        raise ConfigError("--seconds belongs to the other benchmarks: step takes a fixed number of steps")
    return BENCHMARKS[options.name](config, seconds=options.seconds)


def _parser() -> argparse.ArgumentParser:
    described = [
        f"  {name}: {(inspect.getdoc(function) or '').partition('Raises:')[0].strip()}"
        for name, function in BENCHMARKS.items()
    ]
    always = "Every benchmark also returns device, dtype and threads."
    parser = argparse.ArgumentParser(
        prog="python -m ngpt.bench",
        description="\n\n".join([inspect.getdoc(ngpt.bench) or "", *described, always]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS)
    add_config_arguments(parser)
    parser.add_argument(
        "--compile", action="append_const", dest="set", const="compile=true", help="short for --set compile=true"
    )
    parser.add_argument("--seconds", type=float, help="about how long to measure, after the warm-up")
    return parser


if __name__ == "__main__":
    sys.exit(main())
