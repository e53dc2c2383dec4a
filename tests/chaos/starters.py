"""F18: ten processes start on one results directory at once; one gets it, and nine name its process."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.chaos.kills import SCRIPT
from tests.chaos.outcome import Options, Outcome
from tests.chaos.world import CANARIES, World, clear, world

STARTERS = 10
LONG = 1_000_000  # steps: the winner keeps running until it gets a signal
TIMEOUT = 600.0


def run(options: Options) -> Outcome:
    """Runs rounds of forked processes, which have imported everything, and one round of new interpreters."""
    outcome = Outcome()
    with world(keep=options.case is not None) as made:
        text = made.file.read_text().replace("steps: 4", f"steps: {LONG}").replace("every: 2", "every: 1000")
        made.file.write_text(text)
        times: dict[str, list[float]] = {"warm": [], "cold": []}
        for number in range(options.rounds):
            kind = "cold" if number == options.rounds - 1 else "warm"
            if options.case in (None, f"{kind}@{number}"):
                out = made.folder / f"{kind}-{number}"
                found = one_round(made, out, forked=kind == "warm")
                outcome.add(f"{kind}@{number}", found.broken)
                times[kind] += found.seconds
                clear(out)
    for kind, seconds in times.items():
        if seconds:
            outcome.figures[f"s median {kind}"] = round(median(seconds), 2)
            outcome.figures[f"s longest {kind}"] = round(max(seconds), 2)
    return outcome


@dataclass
class Round:
    """The violations, and how many seconds each refused process took."""

    broken: list[str]
    seconds: list[float]


def one_round(made: World, out: Path, *, forked: bool) -> Round:
    """Starts ten processes, waits for nine to exit, and stops the last."""
    out.mkdir()
    since, ended = time.perf_counter(), dict[int, tuple[int, float]]()
    pids = [_fork(made, out, i) if forked else _start(made, out, i) for i in range(STARTERS)]
    while len(ended) < STARTERS - 1 and time.perf_counter() - since < TIMEOUT:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            ended[pid] = os.waitstatus_to_exitcode(status), time.perf_counter() - since
        elif not pid:
            time.sleep(0.01)
    left = [pid for pid in pids if pid not in ended]
    for pid in left:
        os.kill(pid, signal.SIGTERM)
    codes = {pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in left}
    if len(left) != 1:
        return Round([f"F18 {len(left)} of {STARTERS} still run, the others ended with {_codes(ended)}"], [])
    broken = [] if codes[left[0]] == 143 else [f"I9 the winner ended with {codes[left[0]]} after SIGTERM"]
    if _codes(ended) != [3] * (STARTERS - 1):
        broken.append(f"F18 exit codes {_codes(ended)}")
    for i, pid in enumerate(pids):
        said = out.with_name(f"{out.name}-{i}.err").read_text()
        if pid in ended and not re.search(rf"in use by another run \(process {left[0]}\)$", said.strip()):
            broken.append(f"F18 the message does not name process {left[0]}: {said.strip()[-200:]}")
    return Round(broken, [seconds for _, seconds in ended.values()])


def _codes(ended: dict[int, tuple[int, float]]) -> list[int]:
    return sorted(code for code, _ in ended.values())


def _fork(made: World, out: Path, number: int) -> int:
    return made.start(out, beside=out.with_name(f"{out.name}-{number}"))


def _start(made: World, out: Path, number: int) -> int:
    command = [sys.executable, str(SCRIPT), *made.command(out, "--inline")]
    with out.with_name(f"{out.name}-{number}.err").open("wb") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=os.environ | CANARIES)
    process.returncode = 0  # `one_round` waits for it, not the destructor
    return process.pid
