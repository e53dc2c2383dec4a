"""Retry rules: how often a trial that failed is retried, by the cause of the failure.

A retry continues from the trial's newest checkpoint, so it does not change the result. Deaths are counted per session:
running the command again resets the counts and retries failed trials.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.system.memory import is_out_of_memory
from tune.trials.trial import TrialResult

VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True)
class RetryRule:
    """How often a trial is retried after deaths of one kind."""

    kind: str  # causes of the same kind share one count
    retries: int
    description: str  # of the cause, for messages and records
    alone: bool = False  # whether no other trial runs during the retry


RETRY_RULES: dict[str, RetryRule] = {
    "diverged": RetryRule("result", 0, "its loss or a gradient was not finite"),  # counts as a result
    "oom": RetryRule("result", 0, "not enough memory for a single sequence"),  # the batch was already split
    "code_error": RetryRule("result", 0, "an exception in the trial"),  # a retry would raise it again
    "host_oom": RetryRule("memory", 1, "the machine had no memory left", alone=True),
    "killed": RetryRule("process", 3, "its process was killed or crashed"),
    "gpu_error": RetryRule("process", 3, "an error on the GPU ended the process of its group"),
    "hung": RetryRule("process", 3, "it made no progress"),
    "ray_lost": RetryRule("process", 3, "Ray died while it ran"),
    "node_unfit": RetryRule("node", 20, "its node cannot run it"),  # and gets no further trial
    "cannot_start": RetryRule("start", 100, "its worker could not start"),  # charged to the node
    "store_lost": RetryRule("store", 100, "its node could not reach the object store"),
    "node_lost": RetryRule("node", 20, "its node died or was taken away"),  # spot nodes come and go
}


@dataclass(frozen=True)
class WorkerDeath:
    """The death of a process that ran a trial."""

    cause: str
    step: int | None = None  # the last step, if known
    first_step: int | None = None  # the step at which the attempt started, if known
    reason: str | None = None  # instead of the description of its rule


def give_up_reason(deaths: Sequence[WorkerDeath]) -> str | None:
    """Why a trial that died this often is not retried; None if it is retried."""
    newest = deaths[-1]
    rule = RETRY_RULES[newest.cause]
    if dies_at_same_step(deaths):
        return f"{newest.cause}: it died at step {newest.step} twice, the second time without getting any further"
    count = sum(RETRY_RULES[death.cause].kind == rule.kind for death in deaths)
    if count <= rule.retries:
        return None
    alone = ", the last time as the only running trial" if rule.alone and count > 1 else ""
    return f"{newest.cause}: {newest.reason or rule.description}, {count} times{alone}"


def dies_at_same_step(deaths: Sequence[WorkerDeath]) -> bool:
    """Whether the last two attempts died at the same step.

    Attempts that died before training a step do not count: most kills happen at startup and say nothing about a step.
    """
    last = deaths[-2:]
    if len(last) < 2 or any(death.cause in ("ray_lost", "node_lost", "store_lost") for death in last):
        return False
    steps = [(death.first_step, death.step) for death in last]
    have_trained = all(first is not None and step is not None and step > first for first, step in steps)
    return have_trained and last[0].step == last[1].step


def must_run_alone(deaths: Sequence[WorkerDeath]) -> bool:
    """Whether no other trial may run during the next attempt."""
    return any(RETRY_RULES[death.cause].alone for death in deaths)


def failure_cause(result: TrialResult) -> str | None:
    """The key in `RETRY_RULES` for a trial whose process survived; None if it finished or was stopped."""
    if result.status == "diverged":
        return "diverged"
    if result.status != "failed":
        return None
    lines = f"{result.error or ''}\n{result.traceback or ''}".splitlines()  # a cause may be in the traceback only
    # An error of the compiler names the one that it wraps: `torch._inductor.exc.InductorError: MemoryError: `.
    exceptions = {part.rpartition(".")[2] for line in lines for part in line.split(":")[:2]}
    exceptions = {name.strip() for name in exceptions}
    is_oom = exceptions & {"OutOfMemoryError", "MemoryError"} or any(is_out_of_memory(RuntimeError(x)) for x in lines)
    return "oom" if is_oom else "code_error"


def oom_kill_count() -> int:
    """The number of processes that the kernel's OOM killer has killed since boot; 0 if unknown."""
    lines = VMSTAT.read_text().splitlines() if VMSTAT.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
