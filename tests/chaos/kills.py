"""H2: SIGKILL at random moments, each followed by the same command, until the campaign is over.

Most kills hit a run in one process, which takes a second each. Under Ray they hit the run itself, a worker, the raylet,
or the child process that runs Ray.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.chaos.invariants import Acknowledged, Facts, check_finished, check_stopped, facts
from tests.chaos.outcome import Options, Outcome
from tests.chaos.world import CANARIES, CLEAN, LONG_PHASES, Ran, World, clear, world
from tune.storage.journal import JournalError, read_journal

SCRIPT = Path(__file__).parents[2] / "run_campaign.py"
VICTIMS = {"driver": 3, "worker": 5, "raylet": 2, "executor": 1}  # relative frequencies
PAUSE = (0.2, 3.0)  # seconds of training before a kill under Ray
TIMEOUT = 300.0  # seconds to wait for a worker to train
# Ray's agents look for their driver only once a minute.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def run(options: Options) -> Outcome:
    """Spends all kills, on as many campaigns as needed."""
    outcome = Outcome()
    which, _, seed = (options.case or "").partition("@")
    if options.case is None or which == "inline":
        inline_kills(outcome, options.kills - options.ray, int(seed or options.seed), only_one=bool(options.case))
    if options.ray if options.case is None else which == "ray":
        ray_kills(outcome, max(1, options.ray), int(seed or options.seed), only_one=bool(options.case))
    return outcome


# ---- in one process --------------------------------------------------------------------------------------------------


def inline_kills(outcome: Outcome, kills: int, seed: int, *, only_one: bool) -> None:
    """Runs campaigns, each with its own seed, until all kills are spent."""
    since, spent = time.perf_counter(), 0
    with world(steps=12, every=3, seeds="[1, 2, 3]", phases=LONG_PHASES, keep=only_one) as made:
        undisturbed = facts(made.reference)
        whole = made.run(made.folder / "again").seconds
        while spent < kills:
            out = made.folder / f"inline-{seed}"
            killed, broken, ran = inline_campaign(made, undisturbed, out, random.Random(seed), kills - spent, whole)
            whole = min(whole, ran)  # the speed of the machine may change
            outcome.add(f"inline@{seed}", broken)
            outcome.count("inline kills", killed)
            spent, seed = spent + killed, seed + 1
            if not broken:
                clear(out)
            if only_one:
                break
    outcome.figures["inline seconds a kill"] = round((time.perf_counter() - since) / max(1, spent), 2)


def inline_campaign(
    made: World, undisturbed: Facts, out: Path, draw: random.Random, most: int, whole: float
) -> tuple[int, list[str], float]:
    """Runs one campaign and kills it at random moments.

    Args:
        made: the world of the campaign.
        undisturbed: its results without kills.
        out: the results folder.
        draw: chooses the moments.
        most: maximum number of kills.
        whole: seconds that an undisturbed run takes.

    Returns:
        The number of kills, the violations, and about how many seconds an undisturbed run would have taken.
    """
    alone = 0.0
    killed, broken, root = 0, [], out / made.reference.name
    while killed < most:
        ran = made.run_for(draw.uniform(0, whole), out)
        alone += ran.seconds
        if ran.code != -signal.SIGKILL:
            broken += [] if ran.code == 0 else [f"I9 exit code {ran.code} without a fault: {ran.err[-300:]}"]
            break
        killed += 1
        broken += [f"{each} (after kill {killed})" for each in check_stopped(root, made, Acknowledged())]
    ran = made.run(out)
    if ran.code:
        broken.append(f"I9 exit code {ran.code} in the end: {ran.err[-300:]}")
    return killed, broken + check_finished(root, made, undisturbed, Acknowledged()), max(0.3, alone)


# ---- under Ray -------------------------------------------------------------------------------------------------------


def ray_kills(outcome: Outcome, kills: int, seed: int, *, only_one: bool) -> None:
    """Like `inline_kills`, under Ray, with trials that take seconds."""
    since, spent = time.perf_counter(), 0
    with world(steps=240, every=20, seeds="[1, 2, 3]", phases=LONG_PHASES, keep=only_one) as made:
        undisturbed = facts(made.reference)
        while spent < kills:
            campaign = RayCampaign(made, made.folder / f"ray-{seed}", random.Random(seed))
            try:
                campaign.run(kills - spent)
            finally:
                campaign.end()
            campaign.broken += check_finished(campaign.root, made, undisturbed, Acknowledged())
            outcome.add(f"ray@{seed}", campaign.broken)
            for victim, n in campaign.killed.items():
                outcome.count(f"ray {victim} kills", n)
            outcome.count("ray starts", campaign.starts)
            spent, seed = spent + max(1, campaign.killed.total()), seed + 1
            if only_one:
                break
    outcome.figures["ray seconds a kill"] = round((time.perf_counter() - since) / max(1, spent), 2)


@dataclass
class RayCampaign:
    """A campaign under Ray, with the kills and the violations so far."""

    made: World
    out: Path
    draw: random.Random
    starts: int = 0
    killed: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    family: set[psutil.Process] = field(default_factory=set)  # all processes that it ever had

    @property
    def root(self) -> Path:
        return self.out / self.made.reference.name

    def run(self, kills: int) -> None:
        """Kills at most `kills` times, then lets the campaign finish."""
        self.out.mkdir()
        self.start()
        while self.starts <= 2 * kills + 10:
            if self.killed.total() < kills and self.is_training():
                time.sleep(self.draw.uniform(*PAUSE))
                self.kill(self.draw.choices(list(VICTIMS), weights=list(VICTIMS.values()))[0])
            if (code := self.wait(all_done=self.killed.total() >= kills)) is None:
                continue
            if code == 0:
                return
            self.check_end(code)
            self.start()
        self.broken.append(f"I9 not finished after {self.starts} starts")

    def start(self) -> None:
        self.starts += 1
        environment = {name: value for name, value in os.environ.items() if name not in CLEAN} | CANARIES
        with self.out.with_suffix(".out").open("wb") as out, self.out.with_suffix(".err").open("wb") as err:
            command = [sys.executable, str(SCRIPT), *self.made.command(self.out, "--json")]
            self.process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)

    def events(self) -> list[str]:
        """Names of the events since the newest start of the campaign."""
        try:
            names = [event["event"] for event in read_journal(self.root / "journal.jsonl")]
        except JournalError as error:
            self.broken.append(f"I1 {error}")
            return []
        starts = [i for i, name in enumerate(names) if name == "campaign_started"]
        return names[starts[-1] :] if len(starts) == self.starts else []

    def is_training(self) -> bool:
        """Waits until a worker trains; False if the run is over."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.events().count("trial_started") and self.workers():
                return True
            time.sleep(0.1)
        if self.process.poll() is None:
            self.broken.append(f"I9 nothing was trained within {TIMEOUT:.0f} s; it was killed")
            self.process.kill()
        return False

    def relatives(self) -> list[psutil.Process]:
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        self.family.update(found)
        return found

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.relatives() if " seed " in " ".join(_about(process))]

    def kill(self, victim: str) -> None:
        """Kills a process of this kind, if one exists."""
        relatives = self.relatives()
        found = {
            "driver": [psutil.Process(self.process.pid)] if self.process.poll() is None else [],
            "worker": self.workers(),
            "raylet": [process for process in relatives if _about(process)[:1] == ["raylet"]],
            "executor": [process for process in relatives if "spawn_main" in " ".join(_about(process))],
        }[victim]
        if not found:
            return
        try:
            self.draw.choice(found).kill()
        except psutil.NoSuchProcess:
            return
        self.killed[victim] += 1
        if victim == "driver":
            self.process.wait()
            told = Acknowledged()
            self.broken += [f"{each} (after {dict(self.killed)})" for each in check_stopped(self.root, self.made, told)]

    def wait(self, *, all_done: bool) -> int | None:
        """The exit code, or None while the run continues; once all kills are done, waits for the end."""
        if not all_done:
            time.sleep(0.5)
            return self.process.poll()
        try:
            return self.process.wait(timeout=2 * TIMEOUT)
        except subprocess.TimeoutExpired:
            self.broken.append(f"I9 the run hung for {2 * TIMEOUT:.0f} s; it was killed")
            self.process.kill()
            return self.process.wait()

    def check_end(self, code: int) -> None:
        """Checks I9: a run that was not killed itself reports why it ended."""
        err = self.out.with_suffix(".err").read_text(errors="replace")
        ran = Ran(code, err, 0.0)
        if ran.code not in (-signal.SIGKILL, 1, 4):
            self.broken.append(f"I9 exit code {ran.code}: {err[-300:]}")
        if "Traceback" in err:
            self.broken.append(f"I9 a traceback: {err[-600:]}")

    def end(self) -> None:
        """Kills all processes of the campaign; those that should have exited are violations of I9."""
        if self.process.poll() is None:
            self.relatives()
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs([each for each in self.family if each.is_running()], timeout=60)
        left = [process for process in alive if (_about(process) or [""])[0] not in AGENTS]
        self.broken += [f"I9 left running: {' '.join(_about(process))[:80]}" for process in left]
        for process in alive:
            process.kill()


def _about(process: psutil.Process) -> list[str]:
    """Name and command line."""
    try:
        return [process.name(), *process.cmdline()]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
