"""What is done about a trial that did not end well, by the cause. This table is all of it.

A trial that is tried again continues from its newest checkpoint, so a retry changes no result. All counts are of one
run of the command; giving it again starts them anew, and trials that failed are then tried again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.system.memory import is_out_of_memory
from tune.trials.trial import TrialResult

VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True)
class Rule:
    """How often a trial is tried again after deaths of one kind, and whether with nothing beside it."""

    kind: str  # deaths of one kind are counted together
    retries: int
    says: str  # of the death, for people
    alone: bool = False


RETRY_RULES: dict[str, Rule] = {
    "diverged": Rule("result", 0, "its loss or a gradient was not finite"),  # a result like any other
    "oom": Rule("result", 0, "no memory for a single sequence"),  # the train loop has tried with ever fewer at once
    "code_error": Rule("result", 0, "an exception in the trial"),  # it would be raised again
    "host_oom": Rule("memory", 1, "the machine had no memory left", alone=True),
    "killed": Rule("process", 3, "its process was killed or crashed"),
    "hung": Rule("process", 3, "it made no progress"),
    "ray_lost": Rule("process", 3, "Ray died under it"),
}


@dataclass(frozen=True)
class WorkerDeath:
    """The end of a process under a trial: the step it was at, and the one that attempt began at, where known."""

    cause: str
    step: int | None = None
    began: int | None = None

    @property
    def had_progress(self) -> bool:
        """Whether the attempt did any steps."""
        return self.step is not None and self.began is not None and self.step > self.began


def give_up_reason(deaths: Sequence[WorkerDeath]) -> str | None:
    """Why a trial with these deaths behind it is not tried again; None if it is."""
    newest = deaths[-1]
    rule = RETRY_RULES[newest.cause]
    if poisons(deaths):
        return f"{newest.cause}: it died at step {newest.step} twice, the second time without getting any further"
    same = [death for death in deaths if RETRY_RULES[death.cause].kind == rule.kind]
    if len(same) <= rule.retries:
        return None
    last = ", the last time with nothing beside it" if rule.alone and len(same) > 1 else ""
    return f"{newest.cause}: {rule.says}, {len(same)} times{last}"


def poisons(deaths: Sequence[WorkerDeath]) -> bool:
    """Whether the last two attempts both got to the same step and no further: something there kills its process.

    Attempts that died before their first step say nothing: starting takes longest, and is hit most often.
    """
    if len(deaths) < 2 or "ray_lost" in (deaths[-1].cause, deaths[-2].cause):
        return False
    last, before = deaths[-1], deaths[-2]
    return last.had_progress and before.had_progress and last.step == before.step


def must_run_alone(deaths: Sequence[WorkerDeath]) -> bool:
    """Whether the next attempt is to run with no other trial beside it."""
    return any(RETRY_RULES[death.cause].alone for death in deaths)


def failure_cause(result: TrialResult) -> str | None:
    """The entry of `RETRY_RULES` for a trial that ended by itself; None if it ended well."""
    if result.status == "diverged":
        return "diverged"
    if result.status != "failed":
        return None
    lines = (result.error or "").splitlines()
    names = {line.partition(":")[0].rpartition(".")[2] for line in lines}
    is_memory = bool(names & {"OutOfMemoryError", "MemoryError"}) or any(
        is_out_of_memory(RuntimeError(e)) for e in lines
    )
    return "oom" if is_memory else "code_error"


def oom_kill_count() -> int:
    """How many processes the kernel has killed since the machine started because there was no memory; 0 if unknown."""
    if not VMSTAT.exists():
        return 0
    lines = (line.split() for line in VMSTAT.read_text().splitlines())
    return next((int(value) for name, value in lines if name == "oom_kill"), 0)
