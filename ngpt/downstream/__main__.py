"""Scores a trained or converted model on downstream tasks: nanochat's CORE, and those of lm-evaluation-harness.

python -m ngpt.downstream core runs/first
python -m ngpt.downstream lm_eval --model_args pretrained=runs/first --tasks arc_easy,hellaswag --batch_size auto

What follows `lm_eval` are the options of the harness itself (`pip install 'ngpt-campaign[lm-eval]'`); `--model ngpt` is
added unless another model is named. From lm-eval 0.4.14 on, `lm_eval --model ngpt ...` does the same.
"""

if __name__ == "__main__":
    from ngpt.system.start import start_command

    start_command()  # the imports below take seconds

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ngpt.config.visible import visible
from ngpt.data.text.progress import TerminalLog
from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.bundle_files import DOWNLOAD
from ngpt.downstream.core import CoreScore, TaskScore, evaluate_core
from ngpt.downstream.evaluate import core_scores
from ngpt.downstream.harness import require_harness
from ngpt.system.cli import ArgumentParser, exit_process, print_line, run_command, use_plugins, whole_number
from ngpt.training.load_model import add_model_arguments, load_model, parse_model_changes

HARNESS = "lm_eval"
MODEL = "ngpt"  # as the harness knows it
TARGET = "ngpt.downstream.harness_model:HarnessModel"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == [HARNESS]:
        return run_command(lambda: _run_harness(words[1:]))
    options = _parser().parse_args(words)
    return run_command(lambda: _core(options), path=options.checkpoint)


def _run_harness(words: Sequence[str]) -> int:
    """Runs the command of lm-evaluation-harness, which then knows our model."""
    require_harness()
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=TARGET)
    is_run = bool(words) and words[0] not in ("ls", "validate") and not {"-h", "--help"} & set(words)
    names_model = any(word in ("--model", "-M") or word.startswith("--model=") for word in words)
    before = sys.argv
    sys.argv = [HARNESS, *words, *(["--model", MODEL] if is_run and not names_model else [])]
    try:
        with default_signals():
            cli_evaluate()
    finally:
        sys.argv = before
    return 0


@contextlib.contextmanager
def default_signals() -> Iterator[None]:
    """Lets SIGTERM end this process and those that it forks: the harness ends those of its bootstrap in this way."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _core(options: argparse.Namespace) -> int:
    use_plugins(options.plugin)
    given: dict[str, Any] = {"best": options.best, "tokenizer": options.tokenizer, "device": options.device}
    loaded = load_model(options.checkpoint, **given, **parse_model_changes(options.set))
    tasks = read_bundle(options.bundle, limit=options.limit, log=TerminalLog(quiet=options.json))

    def show(found: TaskScore) -> None:
        cut = f", {found.truncated} cut to the context" if found.truncated else ""
        line = f"{found.label:40} accuracy {found.accuracy:.4f}  centred {found.centred:+.4f}"
        print_line(f"{line}  ({found.examples} examples{cut})")

    how: dict[str, Any] = {"dtype": options.dtype, "batch_size": options.batch_size, "after_task": show}
    core = evaluate_core(loaded, tasks, **how)
    about = {"checkpoint": str(loaded.checkpoint.path), "step": loaded.checkpoint.step, "limit": options.limit}
    _print(core, about, as_json=options.json)
    return 0


def _print(core: CoreScore, about: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        tasks = {each.label: each._asdict() for each in core.tasks}
        print(json.dumps(about | core_scores(core) | {"tasks": tasks}, allow_nan=False))
        return
    error = "" if core.stderr is None else f" +- {core.stderr:.4f}"
    print(visible(f"core {core.core:.4f}{error}"))


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m ngpt.downstream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["core", HARNESS], metavar="core|lm_eval", help="what to score the model on")
    add_model_arguments(parser)
    bundle = f"nanochat's eval_bundle, a folder or a .zip; default: {DOWNLOAD}, which downloads it once"
    parser.add_argument("--bundle", default=DOWNLOAD, metavar="PATH", help=bundle)
    parser.add_argument("--tokenizer", metavar="SPEC", help="of the model, if it is not the checkpoint's own")
    parser.add_argument("--limit", type=whole_number(1, 10**9), metavar="N", help="the first N examples of each task")
    batch = "sequences at once; default: as many as memory is likely to hold"
    parser.add_argument("--batch-size", type=whole_number(1, 10**6), metavar="N", help=batch)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    exit_process(main())
