"""Trains one model.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --resume runs/first                          goes on where it stopped, with the same settings
python -m ngpt.train --resume runs/first --set steps=1000         goes on for longer
python -m ngpt.train --init-from runs/first --set lr=1e-3 --out runs/second    starts from its weights

A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) saves at the next step and ends the run; a second one ends it at
once. Exit codes: 0 finished; 2 usage or configuration; 3 another run uses the folder; 4 diverged; 74 input or output;
129, 130, 138, 140, 143 stopped by SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGTERM.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path

from ngpt.config.base import build, flatten, override
from ngpt.data.dataset import open_dataset
from ngpt.model.norm import NORM_MODES
from ngpt.runs.advice import advice
from ngpt.runs.folder import (
    check_continues,
    continue_from,
    locate,
    saved_config,
    start_lines,
    write_config_file,
)
from ngpt.runs.stopping import Stopped, StopRequest
from ngpt.system.cli import EXIT_UNSUCCESSFUL, ArgumentParser, add_set_option, print_line, run_command
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import clear_heartbeat
from ngpt.system.lock import FolderLock
from ngpt.system.timing import slow_dtype_note
from ngpt.training.config import TrainConfig, read_config, resolved, with_absolute_paths
from ngpt.training.loop import train
from ngpt.training.run import RunResult
from ngpt.training.state import Metrics
from ngpt.training.tracker import resolve_tracker

__all__ = ["TrainConfig", "train"]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: _train(options), path=options.out)


def _parser() -> argparse.ArgumentParser:
    about, _, epilog = (__doc__ or "").partition("\n\n")
    parser = ArgumentParser(
        prog="python -m ngpt.train",
        description=about,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    add_set_option(parser)
    modes = f"what divides the residual's step: {', '.join(NORM_MODES)}; short for --set norm_mode=..."
    parser.add_argument("--norm-mode", "--norm_mode", metavar="MODE", help=modes)
    out = "folder for settings, metrics and checkpoints (default runs/default, or the run that is resumed)"
    parser.add_argument("--out", type=Path, help=out)
    resume = "continue from: latest or best, the newest intact checkpoint in --out or that with the lowest validation "
    resume += "loss; or the folder of a run or checkpoint. Settings are those of the run; --set may change steps"
    parser.add_argument("--resume", metavar="FROM", help=resume)
    init = "start a new run from the weights of this run, trial or checkpoint; short for --set init_from=..."
    parser.add_argument("--init-from", metavar="PATH", help=init)
    return parser


def _train(options: argparse.Namespace) -> int:
    out, checkpoint = locate(options.resume, options.out)
    is_new = options.resume is None
    start = None if is_new or options.config is not None else saved_config(out, checkpoint)
    config = read_config(options.config, options.set, start=start)
    given = {"model.norm_mode": options.norm_mode, "init_from": options.init_from}
    config = override(config, {name: value for name, value in given.items() if value is not None})
    config = resolved(build(TrainConfig, with_absolute_paths(flatten(config))))
    tracker = resolve_tracker(config.tracker, out)
    if checkpoint is not None:
        check_continues(config, checkpoint)
    stop = StopRequest(out)
    with FolderLock(out, "run"), stop.on_signal():
        clear_heartbeat(out)
        lines = continue_from(checkpoint, out) if checkpoint else []
        write_config_file(out, config)
        for line in (*lines, *(() if is_new else start_lines(config, out, checkpoint))):
            print_line(line)
        if note := slow_dtype_note(pick_device(config.device), config.dtype):
            print_line(note)
        config = config.model_copy(update={"tracker": tracker})
        result = print_progress(_start(config, out, resume=None if is_new else "extend"), stop)
        clear_heartbeat(out)
    if result is None:
        print_line(stop.sentence(config.steps))
        return stop.exit_code
    print(json.dumps({"status": result.status} | result.metrics, indent=1, allow_nan=False))
    return 0 if result.status == "finished" else EXIT_UNSUCCESSFUL


def _start(config: TrainConfig, out: Path, *, resume: str | None) -> Generator[Metrics, None, RunResult]:
    """Opens the corpus, prints advice about the settings, and trains."""
    dataset = open_dataset(config.data)
    train_tokens, val_tokens = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
    for sentence in advice(config, train_tokens=train_tokens, eval_tokens=val_tokens):
        print_line(f"warning: {sentence}")
    return (yield from train(config, out, resume=resume, dataset=dataset))


def print_progress(run: Generator[Metrics, None, RunResult], stop: StopRequest) -> RunResult | None:
    """Trains to the end, and prints a line to stderr for each evaluation; returns None if a signal stops it."""
    with contextlib.closing(run), contextlib.suppress(Stopped):
        while True:
            try:
                metrics = next(run)
            except StopIteration as end:
                return end.value
            if stop.signal:  # these may be the metrics of before; closing the run saves it
                stop.note_step(int(metrics["step"] or 0))
                break
            shown = {name: metrics[name] for name in ("train_loss", "val_loss", "tokens_per_second")}
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
            print_line(f"step {metrics['step']}  {numbers}")
    return None


if __name__ == "__main__":
    code = main()
    if code > 128:  # a compilation that was interrupted would go on in its processes, and be waited for
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
