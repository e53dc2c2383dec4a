"""The state of a campaign at one moment, for the live view and `status`."""

from dataclasses import dataclass

from tune.storage.summaries import PhaseSummary


@dataclass(frozen=True)
class Running:
    """One trial that is training now."""

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
    """What the live view shows: the state of a campaign at one moment."""

    campaign: str
    status: str
    phase: str | None
    phase_number: int
    n_phases: int
    done: int
    total: int
    total_is_final: bool  # False while later phases may still add trials
    reused: int
    unsuccessful: int  # failed or diverged
    elapsed: float
    eta: float | None
    running: tuple[Running, ...]
    best: tuple[str, float, int] | None  # arm, mean loss, number of seeds
    metric: str
    dashboard_url: str | None
    phases: tuple[PhaseSummary, ...]  # of the finished phases
