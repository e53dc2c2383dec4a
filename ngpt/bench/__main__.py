"""The command `python -m ngpt.bench NAME`."""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import inspect
from collections.abc import Callable
from typing import Any

import ngpt.bench
from ngpt.bench import parts
from ngpt.bench.ensembles import vectorised
from ngpt.bench.options import add_config_arguments, config_of
from ngpt.config.base import ConfigError
from ngpt.system.cli import ArgumentParser, exit_process, run_command
from ngpt.system.timing import print_metrics
from ngpt.training.throughput import measure_step

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "step": measure_step,
    "loss": parts.loss,
    "residual": parts.residual,
    "optimizer": parts.optimizer,
    "projection": parts.projection,
    "loader": parts.loader,
    "generate": parts.generate,
    "checkpoint": parts.checkpoint,
    "vectorised": vectorised,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _benchmark(options))


def _benchmark(options: argparse.Namespace) -> int:
    config = config_of(options)
    if options.seconds is not None and options.name == "step":
        raise ConfigError("--seconds does not apply to the benchmark step: step takes a fixed number of steps")
    budget = {} if options.seconds is None else {"seconds": options.seconds}
    print_metrics(BENCHMARKS[options.name](config, **budget), as_json=options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    texts = {name: (inspect.getdoc(benchmark) or "").partition("Raises:")[0] for name, benchmark in BENCHMARKS.items()}
    descriptions = "\n\n".join(f"  {name}: {text.strip()}" for name, text in texts.items())
    parser = ArgumentParser(
        prog="python -m ngpt.bench",
        description=f"{ngpt.bench.__doc__}\n{descriptions}\n\nEvery benchmark also returns device, dtype and threads.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS)
    add_config_arguments(parser)
    shorthand = "short for --set compile=true"
    parser.add_argument("--compile", action="append_const", dest="set", const="compile=true", help=shorthand)
    parser.add_argument("--seconds", type=float, help="about how long to measure, after the warm-up")
    return parser


if __name__ == "__main__":
    exit_process(main())
