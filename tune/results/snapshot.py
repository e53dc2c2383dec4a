"""Progress of a campaign at one moment, for the live view and `status`."""

from dataclasses import dataclass

from tune.storage.activity import RunActivity
from tune.storage.summaries import PhaseSummary


@dataclass(frozen=True)
class Running:
    """A trial that is training now."""

    trial_id: str
    phase: str
    arm: str
    seed: int
    step: int
    steps: int
    train_loss: float | None
    val_loss: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Waiting:
    """A trial that has been handed to Ray, for which no node has room yet."""

    trial_id: str
    phase: str
    arm: str
    seed: int


@dataclass(frozen=True)
class ArmSoFar:
    """An arm of the phase that is running: its results so far against those of the baseline, without a verdict."""

    arm: str
    is_baseline: bool
    n: int  # finished seeds
    seeds: int  # planned so far
    unsuccessful: int  # failed or diverged
    mean: float | None  # of the metric
    delta: float | None  # arm minus baseline
    ci_low: float | None  # of the delta; None with fewer than two seeds
    ci_high: float | None


@dataclass(frozen=True)
class Progress:
    """How many trials have ended."""

    done: int
    total: int
    total_is_final: bool  # False while later phases, or rounds of seeds, may still add trials


@dataclass(frozen=True)
class Snapshot:
    """Everything that the live view shows."""

    campaign: str
    status: str
    phase: str | None
    phase_number: int
    n_phases: int
    done: int
    total: int
    total_is_final: bool  # False while later phases, or rounds of seeds, may still add trials
    reused: int
    unsuccessful: int  # failed or diverged
    elapsed: float  # seconds over all sessions
    eta: float | None  # seconds until the last trial ends
    running: tuple[Running, ...]
    waiting: tuple[Waiting, ...]
    best: tuple[str, float, int] | None  # arm, mean loss, number of seeds
    metric: str
    dashboard_url: str | None
    phases: tuple[PhaseSummary, ...]  # finished phases only
    most: int | None = None  # the total if no arm is decided early; None if no seeds depend on looks
    look: str | None = None  # what the last look at the current phase decided
    smoke: bool = False  # started with `--smoke`
    arms: tuple[ArmSoFar, ...] = ()  # of the current phase, best first; those without a result last
    alive: bool = True  # whether a process runs the campaign
    run: RunActivity | None = None  # that process and what it does; or, if not alive, the one that was killed
    resume: str | None = None  # the command that continues it, if it was interrupted or killed
