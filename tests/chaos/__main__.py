"""Breaks campaigns in every known way and checks that their results equal those of an undisturbed run.

    python -m tests.chaos                                      everything: 300 kills, every failpoint; one hour
    python -m tests.chaos --only kills --kills 2000 --seed 7   one part, with more kills
    python -m tests.chaos --only failpoints --case eio@144     repeat one case and keep its files

Exit code 0 if every invariant held, else 1, with a line for each violation and the command that repeats it.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable

from ngpt.system.cli import ArgumentParser
from tests.chaos import bits, failpoints, kills, power, starters
from tests.chaos.outcome import Options, Outcome

PARTS: dict[str, Callable[[Options], Outcome]] = {
    "failpoints": failpoints.run,
    "kills": kills.run,
    "power": power.run,
    "starters": starters.run,
    "bits": bits.run,
}


def main() -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="run only this part; repeatable")
    parser.add_argument("--kills", type=int, default=300, metavar="N", help="number of SIGKILLs")
    parser.add_argument("--ray", type=int, metavar="N", help="how many of them under Ray; default: one in ten")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds of ten simultaneous starts")
    parser.add_argument("--bits", type=int, default=200, metavar="N", help="flipped bits in checkpoints, and in shards")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="random seed")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try only every N-th failpoint or disk state")
    parser.add_argument("--faults", metavar="A,B", help=f"some of {', '.join(failpoints.FAULTS)}; default: all")
    parser.add_argument("--case", metavar="CASE", help="run only this case of a failure and keep its files")
    parser.add_argument("--json", action="store_true", help="print a summary on stdout")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # removes temporary folders
    names = given.only or list(PARTS)
    options = Options(
        kills=given.kills,
        ray=given.kills // 10 if given.ray is None else given.ray,
        rounds=given.rounds,
        bits=given.bits,
        seed=given.seed,
        every=given.every,
        faults=tuple(given.faults.split(",")) if given.faults else tuple(failpoints.FAULTS),
        case=given.case,
    )
    summary, since = {}, time.perf_counter()
    for name in names:
        start = time.perf_counter()
        outcome = PARTS[name](options)
        seconds = time.perf_counter() - start
        summary[name] = outcome.summary() | {"seconds": round(seconds, 1)}
        for case, sentence in outcome.failures:
            print(f"{name} {case}: {sentence}", file=sys.stderr)
            print(
                f"  repeat: python -m tests.chaos --only {name} --seed {given.seed} --case {shlex.quote(case)}",
                file=sys.stderr,
            )
        figures = ", ".join(f"{value} {what}" for what, value in outcome.figures.items())
        held = "held" if not outcome.failures else f"{len(outcome.failures)} failures"
        print(f"{name}: {outcome.tried} cases, {held}; {figures}; {seconds:.0f} s", file=sys.stderr, flush=True)
    if given.json:
        print(json.dumps(summary | {"all": {"seconds": round(time.perf_counter() - since, 1)}}, indent=1))
    return 1 if any(part["failures"] for part in summary.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
