"""The command `python -m ngpt.sizing`: what a model needs on several GPUs, before it runs.

python -m ngpt.sizing --set model=experiments/models/1B.yaml dtype=bfloat16 batch_size=64 --gpu h100 --ranks 1 2 8 64

Memory of each GPU, bytes that it sends in a step, and tokens/s of all, for ddp and fsdp, with and without activation
checkpointing. Memory is an upper bound from the shapes of the real model. Times are on paper: FLOPs at an assumed share
of the peak, and messages at stated bandwidths. They ignore the step of the optimizer, data and checkpoints.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import json
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.sizing.hardware import GPUS, find_gpu
from ngpt.sizing.step_time import LINK_SHARE, MFU
from ngpt.sizing.table import plan_rows, table_lines
from ngpt.system.cli import (
    ArgumentParser,
    add_set_option,
    exit_process,
    print_line,
    print_lines,
    run_command,
    whole_number,
)
from ngpt.training.config import read_config, resolved


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m ngpt.sizing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings, as for ngpt.train")
    add_set_option(parser)
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}; default: h100")
    ranks = {"type": whole_number(1, 4096), "nargs": "+", "metavar": "N"}
    parser.add_argument("--ranks", default=[1, 2, 8], help="numbers of GPUs; default: 1 2 8", **ranks)
    parser.add_argument(
        "--mfu", type=float, default=MFU, help=f"share of the peak FLOP/s that is reached; default: {MFU}"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    return run_command(lambda: _print_plan(options))


def _print_plan(options: argparse.Namespace) -> int:
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu must be above 0 and at most 1, got {options.mfu:g}")
    config, gpu = read_config(options.config, options.set), find_gpu(options.gpu)
    if config.model.vocab_size is None:
        config = resolved(config)
    uneven = [count for count in options.ranks if config.batch_size % count]
    if len(uneven) == len(options.ranks):
        raise ConfigError(f"batch_size {config.batch_size} cannot be divided among {uneven[0]} ranks")
    rows = plan_rows(config, gpu, options.ranks, mfu=options.mfu)
    if options.json:
        print(json.dumps({"gpu": options.gpu, "mfu": options.mfu, "rows": rows}, allow_nan=False))
        return 0
    print_lines("\n".join(table_lines(rows)))
    rate = f"{gpu.rate(config.dtype) * options.mfu / 1e12:.3g} TFLOP/s"
    print_line(
        f"GB of each GPU; {config.tokens_per_step:,} tokens a step; {options.gpu} at {rate}, links at {LINK_SHARE:.0%}"
    )
    if uneven:
        print_line(
            f"left out: batch_size {config.batch_size} cannot be divided among {', '.join(map(str, uneven))} ranks"
        )
    return 0


if __name__ == "__main__":
    exit_process(main())
