"""The command `python -m tune.bench NAME`."""

if __name__ == "__main__":
    from ngpt.system.start import check_installation

    check_installation()

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tune.bench
from ngpt.config.base import ConfigError
from ngpt.system.cli import ArgumentParser, add_set_option, run_command
from ngpt.system.timing import print_metrics
from tune.bench.campaigns import campaign, scaling
from tune.bench.confirmations import confirmations
from tune.bench.dispatch import dispatch
from tune.bench.packing import packing
from tune.bench.sequential import sequential
from tune.bench.verdicts import verdict_table, verdicts


def gpu(*, tiny: bool = False) -> dict[str, Any]:
    """Benchmarks one GPU with the shapes of experiments/, in under ten minutes; only in a checkout.

    The same as `python -m benchmarks.gpu`, whose --help has the fields. tiny: shapes that take seconds on a CPU.
    """
    try:
        module = importlib.import_module("benchmarks.gpu")
    except ModuleNotFoundError:
        raise ConfigError("gpu needs the shapes of a checkout, which are not installed: run it there") from None
    return module.measure_all(tiny=tiny)


BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "campaign": campaign,
    "scaling": scaling,
    "dispatch": dispatch,
    "packing": packing,
    "gpu": gpu,
    "confirmations": confirmations,
    "sequential": sequential,
    "verdicts": verdicts,
}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"verdicts": verdict_table}  # what is not one line a metric


def main(arguments: list[str] | None = None) -> int:
    """Runs a benchmark from the command line and returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    name, as_json = options.pop("name"), options.pop("json")
    given_options = {
        option: value for option, value in options.items() if value is not None and value is not False and value != []
    }

    def command() -> int:
        """Runs the benchmark with the options that it has, and prints its numbers."""
        parameters = inspect.signature(BENCHMARKS[name]).parameters
        for option in given_options.keys() - parameters.keys():
            allowed = ", ".join(f"--{parameter}" for parameter in parameters)
            raise ConfigError(f"{name} has no option --{option}; its options are {allowed}")
        metrics = BENCHMARKS[name](**given_options)
        if name in TABLES and not as_json:
            print(TABLES[name](metrics))
        else:
            print_metrics(metrics, as_json=as_json)
        return 0

    return run_command(command)


def _parser() -> argparse.ArgumentParser:
    descriptions = [f"  {name}: {inspect.getdoc(function)}" for name, function in BENCHMARKS.items()]
    parser = ArgumentParser(
        prog="python -m tune.bench",
        description="\n\n".join([inspect.getdoc(tune.bench) or "", *descriptions]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--trials", type=int, help="campaign, scaling, dispatch: number of trials; sequential: of phases"
    )
    parser.add_argument("--seconds", type=float, help="training time per trial; packing: per point of the curve")
    parser.add_argument("--steps", type=int, help="campaign, scaling: steps per trial, instead of --seconds")
    parser.add_argument("--workers", type=int, help="campaign, scaling, dispatch: number of concurrent trials")
    parser.add_argument(
        "--rounds",
        type=int,
        help="scaling: repetitions of one worker, then several; confirmations: simulated campaigns",
    )
    parser.add_argument("--phases", type=int, help="verdicts: simulated phases for each share; dispatch: phases")
    parser.add_argument("--arms", type=int, help="sequential: number of arms, baseline included")
    parser.add_argument("--start", type=int, help="sequential: seeds of the first round")
    parser.add_argument("--most", type=int, help="sequential: largest number of seeds of an arm")
    parser.add_argument("--config", type=Path, help="packing: YAML file with settings, as for ngpt.train")
    parser.add_argument("--tiny", action="store_true", help="gpu: tiny shapes, as a test")
    add_set_option(parser, help="packing: settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
