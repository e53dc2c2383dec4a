"""The command-line options shared by all benchmarks of a training configuration."""

import argparse
from pathlib import Path

import torch

from ngpt.system.cli import add_set_option, whole_number
from ngpt.system.device import DTYPES, pick_device
from ngpt.training.config import TrainConfig, read_config


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `config_of` reads, and --json."""
    parser.add_argument("--config", type=Path, help="YAML file of settings, as for ngpt.train")
    add_set_option(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="short for --set dtype=...")
    parser.add_argument("--threads", type=whole_number(1, 4096), help="CPU threads; default: torch's")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def config_of(options: argparse.Namespace) -> TrainConfig:
    """Reads the training config from the command line; also sets the number of threads."""
    dtype = [f"dtype={options.dtype}"] if options.dtype else []
    config = read_config(options.config, [*options.set, *dtype])
    pick_device(config.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    return config
