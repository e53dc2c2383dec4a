"""Trains one model.

python -m ngpt.train --set alpha=0.2 steps=500 --out runs/first
python -m ngpt.train --resume runs/first                          goes on where it stopped, with the same settings
python -m ngpt.train --resume runs/first --set steps=1000         goes on for longer
python -m ngpt.train --init-from runs/first --set lr=1e-3 --out runs/second    starts from its weights

A signal (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2) saves at the next step and ends the run; a second one ends it at
once. Exit codes: 0 finished; 2 usage or configuration; 3 another run uses the folder; 4 diverged; 74 input or output;
129, 130, 138, 140, 143 stopped by SIGHUP, SIGINT, SIGUSR1, SIGUSR2, SIGTERM.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ngpt.config.base import build, flatten, override
from ngpt.data.dataset import open_dataset, prepare
from ngpt.data.text.progress import Meter, TerminalLog
from ngpt.distributed.join import is_rank, joined_ranks, share_devices
from ngpt.distributed.launch import launch, rank_command
from ngpt.distributed.ranks import ALONE, Ranks
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
from ngpt.system.cli import (
    EXIT_UNSUCCESSFUL,
    ArgumentParser,
    add_plugin_option,
    add_set_option,
    exit_process,
    plugins_for_help,
    print_line,
    run_command,
    use_plugins,
    whole_number,
)
from ngpt.system.device import pick_device
from ngpt.system.heartbeat import clear_heartbeat, read_heartbeat
from ngpt.system.lock import FolderLock
from ngpt.system.timing import slow_dtype_note
from ngpt.trackers.config import resolve_tracker
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.config import TrainConfig, read_config, resolved, with_absolute_paths
from ngpt.training.loop import train
from ngpt.training.run import RunResult
from ngpt.training.state import Metrics

__all__ = ["TrainConfig", "train"]

SHOW_STEPS_EVERY = 0.25  # seconds


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    plugins_for_help(arguments)
    options = _parser().parse_args(arguments)
    return run_command(lambda: _train(options, arguments), path=options.out)


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
    add_plugin_option(parser)
    modes = f"what divides the residual's step: {', '.join(NORM_MODES)}; short for --set norm_mode=..."
    parser.add_argument("--norm-mode", "--norm_mode", metavar="MODE", help=modes)
    out = "folder for settings, metrics and checkpoints (default runs/default, or the run that is resumed)"
    parser.add_argument("--out", type=Path, help=out)
    resume = "continue from: latest or best, the newest intact checkpoint in --out or that with the lowest validation "
    resume += "loss; or the folder of a run or checkpoint. Settings are those of the run; --set may change steps"
    parser.add_argument("--resume", metavar="FROM", help=resume)
    init = "start a new run from the weights of this run, trial or checkpoint; short for --set init_from=..."
    parser.add_argument("--init-from", metavar="PATH", help=init)
    ranks = "processes that train the model together on this host, each on a GPU or a part of the cores (default 1)"
    parser.add_argument("--ranks", type=whole_number(1, 1024), default=1, metavar="N", help=ranks)
    return parser


class Start(NamedTuple):
    """How a run starts: a new one, or from a checkpoint if it has one."""

    config: TrainConfig
    out: Path
    checkpoint: Checkpoint | None
    is_new: bool


def _train(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    use_plugins(options.plugin)
    if options.ranks > 1 and not is_rank():
        start = _read(options)  # for its errors
        again = ["--resume", str(start.out), *(word for name in options.plugin for word in ("--plugin", name))]
        return launch(lambda has_begun: rank_command("ngpt.train", again if has_begun else arguments), options.ranks)
    with joined_ranks() as ranks:
        start = ranks.from_first(lambda: _read(options))
        if ranks.count > 1:
            share_devices(start.config.device)
        return _run(start, ranks)


def _read(options: argparse.Namespace) -> Start:
    """Reads the settings, and checks that a resumed run can continue with them."""
    out, checkpoint = locate(options.resume, options.out)
    is_new = options.resume is None
    start = None if is_new or options.config is not None else saved_config(out, checkpoint)
    config = read_config(options.config, options.set, start=start)
    given = {"model.norm_mode": options.norm_mode, "init_from": options.init_from}
    config = override(config, {name: value for name, value in given.items() if value is not None})
    config = resolved(build(TrainConfig, with_absolute_paths(flatten(config))))
    if checkpoint is not None:
        check_continues(config, checkpoint)
    return Start(config, out, checkpoint, is_new)


def _run(start: Start, ranks: Ranks) -> int:
    config, stop = start.config, StopRequest(ranks.folder(start.out))
    # A plug-in may print, and stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = (_run_first if ranks.is_first else _run_other)(start, stop, ranks)
    if result is None:
        print_line(stop.sentence(config.steps))
        return stop.exit_code
    if ranks.is_first:
        print(json.dumps({"status": result.status} | result.metrics, indent=1, allow_nan=False))
    return 0 if result.status == "finished" else EXIT_UNSUCCESSFUL


def _run_first(start: Start, stop: StopRequest, ranks: Ranks) -> RunResult | None:
    """Trains on the only rank, or on the first one, which writes the files and tells what happens."""
    config, out, checkpoint, is_new = start
    tracker = resolve_tracker(config.tracker, out)
    with FolderLock(out, "run"), stop.on_signal():
        clear_heartbeat(out)
        lines = continue_from(checkpoint, out) if checkpoint else []
        write_config_file(out, config)
        for line in (*lines, *(() if is_new else start_lines(config, out, checkpoint))):
            print_line(line)
        if note := slow_dtype_note(pick_device(config.device), config.dtype):
            print_line(note)
        config = config.model_copy(update={"tracker": tracker})
        with show_steps(out, config.steps):
            result = print_progress(_start(config, out, resume=_resume(start), ranks=ranks), stop, ranks)
        clear_heartbeat(out)
    return result


def _run_other(start: Start, stop: StopRequest, ranks: Ranks) -> RunResult | None:
    """Trains on a rank that is not the first."""
    with stop.on_signal():
        clear_heartbeat(ranks.folder(start.out))
        return print_progress(train(start.config, start.out, resume=_resume(start), ranks=ranks), stop, ranks)


def _resume(start: Start) -> str | None:
    return None if start.is_new else "extend"


def _start(config: TrainConfig, out: Path, *, resume: str | None, ranks: Ranks) -> Generator[Metrics, None, RunResult]:
    """Opens the corpus, prints advice about the settings, and trains."""
    prepare(config.data, log=TerminalLog())
    dataset = open_dataset(config.data)
    train_tokens, val_tokens = (sum(map(len, shards)) for shards in (dataset.train, dataset.val))
    sizes = {"train_tokens": train_tokens, "eval_tokens": val_tokens}
    for sentence in advice(config, **sizes, has_tokenizer=dataset.has_tokenizer):
        print_line(f"warning: {sentence}")
    return (yield from train(config, out, resume=resume, dataset=dataset, ranks=ranks))


@contextlib.contextmanager
def show_steps(out: Path, steps: int) -> Iterator[None]:
    """Shows how many steps are done, from the heartbeat of the run, until the context closes."""
    is_over = threading.Event()

    def watch() -> None:
        """Shows the step of each new heartbeat."""
        meter = first = None
        while not is_over.wait(SHOW_STEPS_EVERY):
            if (beat := read_heartbeat(out)) is None:
                continue
            if meter is None or first is None or beat.step < first:  # it begins, or has rolled back
                meter, first = Meter(TerminalLog(), "training"), beat.step
            if beat.step > first:  # the first evaluation is over
                meter.update(beat.step - first, "steps", fraction=beat.step / steps, before=first / steps)

    watcher = threading.Thread(target=watch, daemon=True, name="progress")
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def print_progress(
    run: Generator[Metrics, None, RunResult], stop: StopRequest, ranks: Ranks = ALONE
) -> RunResult | None:
    """Trains to the end, and prints a line to stderr for each evaluation; returns None if a signal stops it."""
    with contextlib.closing(run), contextlib.suppress(Stopped):
        while True:
            try:
                metrics = next(run)
            except StopIteration as end:
                return end.value
            if ranks.stops(bool(stop.signal)):  # these may be the metrics of before; closing the run saves it
                stop.note_step(int(metrics["step"] or 0))
                break
            shown = {name: metrics[name] for name in ("train_loss", "val_loss", "tokens_per_second")}
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
            with contextlib.suppress(OSError):  # the terminal is closed, or nobody reads the pipe any more
                print_line(f"step {metrics['step']}  {numbers}")
    return None


if __name__ == "__main__":
    exit_process(main())
