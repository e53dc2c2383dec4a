"""Progress of a campaign at one moment, for the live view and `status`."""

from dataclasses import dataclass

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
    best: tuple[str, float, int] | None  # arm, mean loss, number of seeds
    metric: str
    dashboard_url: str | None
    phases: tuple[PhaseSummary, ...]  # finished phases only
    most: int | None = None  # the total if no arm is decided early; None if no seeds depend on looks
    look: str | None = None  # what the last look at the current phase decided
    smoke: bool = False  # started with `--smoke`
