"""What a campaign costs besides training: `python -m tune.bench campaign --json`.

Both benchmarks run real campaigns of tiny trials on a private Ray, in a temporary folder, through the same code as
`run_campaign.py`.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ngpt.bench import print_figures
from tune.campaign import load_campaign
from tune.journal import read_journal
from tune.launch import launch

TINY = """
campaign: bench
seeds: {seeds}
base:
  model: {{n_layer: 2, n_head: 2, n_embd: 64, block_size: 64, mlp: relu2}}
  data: {{corpus: python-docs, tokenizer: "sentencepiece:1024"}}
  batch_size: 16
  steps: {steps}
  eval_every: {steps}
  eval_tokens: 1024
resources: {{cpus_per_trial: 1, workers: {workers}}}
vary: {{alpha: [0.05, 0.1]}}
"""


def campaign(*, trials: int = 60, steps: int = 40, workers: int = 2) -> dict[str, Any]:
    """What one more trial costs: a campaign of a third of the trials against one of all of them, on the same machine.

    trials: of the larger campaign. startup_seconds: from the call to the first trial. seconds_per_extra_trial: a
    worker's time per additional trial besides its training steps (evaluation, model and optimizer construction, files,
    Ray). efficiency: time inside training steps over wall time (from the first trial on) times workers.
    """
    small, large = (_timed(n, steps=steps, workers=workers) for n in (trials // 3, trials))
    extra = trials - trials // 3
    slot_time = (large["seconds"] - small["seconds"]) * workers / extra
    step_time = (large["step_seconds"] - small["step_seconds"]) / extra
    return {
        "trials": trials,
        "workers": workers,
        "steps_per_trial": steps,
        "startup_seconds": large["startup_seconds"],
        "seconds_per_trial": slot_time,
        "step_seconds_per_trial": step_time,
        "seconds_per_extra_trial": slot_time - step_time,
        "efficiency": large["step_seconds"] / (large["seconds"] * workers),
    }


def scaling(*, trials: int = 20, steps: int = 120, rounds: int = 1) -> dict[str, Any]:
    """How much faster two workers finish a campaign than one, in rounds of one and two in turn.

    speedup: wall time from the first trial's start to the end of the last; speedup_with_startup: of the whole command.
    Each is the ratio of the sums over the rounds, since the speed of a shared machine drifts.
    """
    runs = [(_timed(trials, steps=steps, workers=1), _timed(trials, steps=steps, workers=2)) for _ in range(rounds)]
    ones, twos = zip(*runs, strict=True)

    def total(group: Sequence[dict[str, float]], *names: str) -> float:
        return sum(run[name] for run in group for name in names)

    return {
        "trials": trials,
        "steps_per_trial": steps,
        "rounds": rounds,
        "one_worker_seconds": total(ones, "seconds") / rounds,
        "two_workers_seconds": total(twos, "seconds") / rounds,
        "speedup": total(ones, "seconds") / total(twos, "seconds"),
        "speedup_with_startup": total(ones, "seconds", "startup_seconds") / total(twos, "seconds", "startup_seconds"),
        "tokens_per_second_one_worker": total(ones, "tokens_per_second") / rounds,
        "tokens_per_second_of_each_of_two": total(twos, "tokens_per_second") / rounds,
    }


BENCHMARKS: dict[str, Callable[[], dict[str, Any]]] = {"campaign": campaign, "scaling": scaling}


def _timed(trials: int, *, steps: int, workers: int) -> dict[str, float]:
    """Runs a campaign of tiny trials and reads its times off the journal."""
    with tempfile.TemporaryDirectory(prefix="ngpt-bench-") as folder:
        path = Path(folder) / "bench.yaml"
        seeds = list(range(1, trials // 2 + 1))
        path.write_text(TINY.format(seeds=seeds, steps=steps, workers=workers))
        called = time.time()
        launch(load_campaign(path), Path(folder) / "results", command="tune.bench", view=_silent)
        events = read_journal(Path(folder) / "results" / "journal.jsonl")
    started = [_time(event) for event in events if event["event"] == "trial_started"]
    ended = [event for event in events if event["event"] == "trial_finished"]
    # Steady-state speed times the trial's tokens: what its steps would take on their own.
    steps_taken = [event["metrics"]["tokens"] / event["metrics"]["tokens_per_second"] for event in ended]
    return {
        "startup_seconds": started[0] - called,
        "seconds": _time(ended[-1]) - started[0],
        "step_seconds": sum(steps_taken),
        "tokens_per_second": sum(event["metrics"]["tokens_per_second"] for event in ended) / len(ended),
    }


def _time(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


@contextlib.contextmanager
def _silent(snapshot: Callable[[], Any]) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(message=lambda text: None)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    names = "\n\n".join(f"{name}: {function.__doc__}" for name, function in BENCHMARKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tune.bench", description=f"{__doc__}\n{names}", formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args(arguments)
    print_figures(BENCHMARKS[options.name](), as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
