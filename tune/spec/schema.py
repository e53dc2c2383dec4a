"""The types of a campaign that has been read and checked (tune/campaign.py)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count, takewhile
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from ngpt.config.base import Config, Location, invalid_setting, one_of
from ngpt.training.config import TrainConfig
from tune.spec.search_space import Search
from tune.spec.sweeps import SWEEPS, ArmSpec
from tune.storage.winners import InheritedWinner, is_path

LOSS_METRICS = ("val_loss", "val_bpb", "train_loss")
GOALS = ("minimize", "maximize")
STOPPERS = ("asha",)  # how trials may be stopped early
HOLDS = ("tokens", "steps", "seconds")  # what may be equal between arms
KINDS = (*SWEEPS, "runs", "combine", "search")  # of phases; each has exactly one
MOST_TRIALS = 10_000  # of a campaign


def _share(value: Any) -> Any:
    """GPUs per trial: `auto`, or a positive number."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf):
        raise invalid_setting(f"expected `auto` or a number above 0, got {value!r}")
    return value


class Metric(Config):
    """The metric that arms are compared by."""

    name: Annotated[str, one_of(LOSS_METRICS, "metric")] = "val_loss"
    goal: Annotated[str, one_of(GOALS, "goal")] = "minimize"


class Resources(Config):
    """The share of the machine that a trial gets."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1  # threads
    gpus_per_trial: Annotated[Any, PlainValidator(_share)] = "auto"  # auto: measured
    workers: Annotated[int, Field(ge=1)] | None = None  # processes that train at once; null: as many as fit
    vectorise: Annotated[int, Field(ge=1)] = 1  # trials of one graph that a process trains at once
    # seconds without a step after which a trial counts as hung; null: 20 median steps, at least ten minutes
    stall_timeout: Annotated[float, Field(gt=0)] | None = None


class Budget(Config):
    """Limits after which no trial starts, counted over all sessions (tune/planning/budget.py)."""

    trials: Annotated[int, Field(ge=1)] | None = None
    hours: Annotated[float, Field(gt=0)] | None = None


class EarlyStop(Config):
    """When a search stops a trial early (tune/analysis/asha.py)."""

    method: Annotated[str, one_of(STOPPERS, "method")] = "asha"
    reduction: Annotated[int, Field(ge=2)] = 3  # 1 in 3 trials continues at a rung; the next rung is 3 times as far
    first: Annotated[int, Field(ge=1)]  # rung, in steps of the baseline

    def rungs(self, steps: int) -> list[int]:
        """The steps at which trials are compared, before the end at `steps`."""
        rungs = (self.first * self.reduction**i for i in count())
        return list(takewhile(lambda rung: rung < steps, rungs))


class Header(Config):
    """The settings of the campaign itself: all of the file but names, seeds, base, phases and claims."""

    description: str | None = None
    metric: Metric = Metric()
    hold: Annotated[str, one_of(HOLDS, "quantity to hold")] = "tokens"
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    min_effect: Annotated[float, Field(ge=0)] = 0.005
    resources: Resources = Resources()
    noise: Annotated[float, Field(gt=0)] | None = None  # sd of the metric between seeds, for --plan
    budget: Budget = Budget()
    early_stop: EarlyStop | None = None


@dataclass(frozen=True)
class FreshSeeds:
    """`seeds: fresh N`: N seeds that no other phase of the campaign uses."""

    n: int


@dataclass(frozen=True)
class Phase:
    """A baseline and the arms that are compared with it."""

    name: str
    inherit: str | None  # the phase whose winner is the base here; a path is one of another results directory
    pinned: Mapping[str, Any]  # `set:`, the settings of all arms, by dotted name
    arms: tuple[ArmSpec, ...]  # without the baseline, unless it was listed
    seeds: tuple[int, ...] | FreshSeeds
    swept: Mapping[str, tuple[Any, ...]]  # the axes, by dotted name
    combine: tuple[str, ...] = ()  # the phases whose better arms are joined
    search: Search | None = None  # from which optuna proposes arms, batch by batch
    hold: str | None = None  # what is equal between the arms; None: as in the campaign
    stops_early: bool = False  # whether `early_stop:` applies
    origins: Mapping[str, Location] = field(default_factory=dict, compare=False)  # of `pinned` in the YAML

    @property
    def needs(self) -> set[str]:
        """The phases whose winners must be known before this one can start."""
        named = (self.inherit, *self.combine, *(arm.inherit for arm in self.arms))
        return {name for name in named if name and not is_path(name)}


@dataclass(frozen=True)
class Claim:
    """A sentence of an earlier report that the records can decide (tune/claims/relations.py).

    `left` and `right` select arms, by values of dotted settings and by the names of `arm` and `phase`.
    """

    id: str
    relation: str
    source: str | None = None  # the report that says so
    says: str | None = None
    metric: str = "val_loss"
    phase: str | None = None  # None: all
    left: Mapping[str, Any] | None = None
    right: Mapping[str, Any] | None = None
    setting: str | None = None  # the varied one, by dotted name
    direction: str | None = None  # of the metric along `setting`
    value: float | None = None
    tolerance: float | None = None
    expression: str | None = None


@dataclass(frozen=True)
class Campaign:
    """A checked campaign file: names are resolved, values have the right type, phases are in order of need."""

    name: str
    description: str | None
    metric: Metric
    hold: str  # what is equal between arms: tokens | steps | seconds
    confidence: float
    min_effect: float  # in units of the metric
    base: TrainConfig
    resources: Resources
    noise: float | None
    budget: Budget
    early_stop: EarlyStop | None
    phases: tuple[Phase, ...]
    text: str  # the file as given
    assignments: tuple[str, ...]  # --set
    # winners of other results directories, by path
    inherited: Mapping[str, InheritedWinner] = field(default_factory=dict)
    # measured, for `hold: seconds` (tune/planning/equal_time.py)
    speeds: Mapping[str, float] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
