"""The types of a validated campaign, as tune/campaign.py builds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PlainValidator, model_validator

from ngpt.config.base import Config, Location, invalid_setting, one_of
from ngpt.distributed.strategies import STRATEGIES
from ngpt.downstream.config import DownstreamTasks, Names
from ngpt.model.config import Count
from ngpt.training.config import TrainConfig
from tune.spec.metrics import KNOWN_METRICS
from tune.spec.search_space import Search
from tune.spec.sweeps import SWEEPS, ArmSpec
from tune.storage.names import MAX_SEED
from tune.storage.winners import InheritedWinner, is_path

GOALS = ("minimize", "maximize")
EARLY_STOP_METHODS = ("asha",)
HOLDS = ("tokens", "steps", "seconds")  # quantities that can be kept equal between arms
MAX_TRIALS = 10_000  # per campaign
FEWEST_FRESH, MOST_FRESH = 4, 30  # number of seeds that `seeds: fresh` chooses from


def kinds() -> tuple[str, ...]:
    """The kinds of phases; each phase has exactly one. A plug-in may add sweeps."""
    return (*SWEEPS, "runs", "combine", "search")


MAX_GPUS = 1024  # of a trial
SMALLEST_GPU_SHARE = 0.0001  # Ray counts GPUs in steps of this size
MAX_PROCESSES = 4096  # of a campaign, and threads of each
MAX_RANKS = 1024  # of a trial


def _gpus_per_trial(value: Any) -> Any:
    if value == "auto":
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Ray places whole GPUs, or a part of one: no trial could ever get 1.5.
    is_whole = is_number and 0 <= value <= MAX_GPUS and value == int(value)
    if not is_whole and not (is_number and SMALLEST_GPU_SHARE <= value < 1):
        numbers = f"a whole number from 0 to {MAX_GPUS}, or a share of a GPU from {SMALLEST_GPU_SHARE} to below 1"
        raise invalid_setting(f"expected `auto`, {numbers}, got {value!r}")
    return value


class Metric(Config):
    """The metric by which arms are compared."""

    name: Annotated[str, one_of(KNOWN_METRICS, "metric")] = "val_loss"
    """What arms are compared by: a metric of a trial, or one that a plug-in adds; `val_bpb` also across tokenizers."""
    goal: Annotated[str, one_of(GOALS, "goal")] = "minimize"
    """Whether lower or higher is better; if it is left out, as the metric says."""


class Resources(Config):
    """CPUs and GPUs per trial, and how many trials train concurrently."""

    cpus_per_trial: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] = 1
    """CPU threads of a trial; its ranks share them, with at least one each."""
    gpus_per_trial: Annotated[
        Any, PlainValidator(_gpus_per_trial), Field(title=f"auto or number from 0 to {MAX_GPUS}")
    ] = "auto"
    """GPUs of a trial, whole or a share; auto: as many trials per GPU as are fastest; 0: the CPU. A rank has one."""
    ranks_per_trial: Annotated[int, Field(ge=1, le=MAX_RANKS)] = 1
    """Processes that train a trial together, each on a GPU of its own or a part of the CPU threads."""
    strategy: Annotated[str, one_of(STRATEGIES, "strategy")] = "ddp"
    """How the ranks of a trial share its model: with `ddp` each has all of it, with `fsdp` a part of each weight."""
    across_nodes: bool = False
    """With --address: whether the ranks of a trial may train on several nodes, if no node has room for all."""
    workers: Annotated[int, Field(ge=1, le=MAX_PROCESSES)] | None = None
    """Processes that train at the same time; null: as many as fit."""
    vectorise: Annotated[int, Field(ge=1, le=1024)] = 1
    """Trials of one graph that one process trains as a batched program."""
    stall_timeout: Annotated[float, Field(ge=1, le=10**7)] | None = None
    """Seconds without a step until a trial counts as hung; null: 20 median steps, at least ten minutes."""
    wait_for_nodes: Annotated[float, Field(ge=1, le=10**7)] | None = None
    """With --address: seconds to wait for a node with room; null: not at the start, later ten minutes."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        n_ranks = self.ranks_per_trial
        given = [name for name in ("strategy", "across_nodes") if name in self.model_fields_set]
        if given and "ranks_per_trial" not in self.model_fields_set:
            raise invalid_setting("is for several ranks: give their number as ranks_per_trial", given[0])
        if n_ranks == 1:
            return self
        if self.cpus_per_trial % n_ranks and self.cpus_per_trial != 1:
            text = (
                f"{self.cpus_per_trial} threads cannot be divided among {n_ranks} ranks; give a multiple of {n_ranks}"
            )
            raise invalid_setting(text, "cpus_per_trial")
        if self.gpus_per_trial not in ("auto", 0, n_ranks):
            text = f"each of {n_ranks} ranks has a GPU of its own: expected auto, {n_ranks}, or 0 for the CPU"
            raise invalid_setting(f"{text}, got {self.gpus_per_trial!r}", "gpus_per_trial")
        if self.vectorise > 1:
            text = f"a process trains one trial as one of its {n_ranks} ranks, so it batches none: leave out vectorise"
            raise invalid_setting(text, "vectorise")
        return self

    @property
    def cpus_per_rank(self) -> int:
        """CPU threads of each rank, or of the trial if it has one."""
        return max(1, self.cpus_per_trial // self.ranks_per_trial)

    @property
    def gpus_per_rank(self) -> float:
        """GPUs of each rank, or of the trial if it has one; not for `auto`."""
        return self.gpus_per_trial / self.ranks_per_trial


class Budget(Config):
    """Limits on the total over all sessions, after which no trial is started (tune/planning/budget.py)."""

    trials: Count | None = None
    """Trials, over all sessions, after which none is started; null: no limit."""
    hours: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Hours, over all sessions, after which no trial is started; null: no limit."""


class EarlyStop(Config):
    """When a search stops trials early (tune/analysis/asha.py)."""

    method: Annotated[str, one_of(EARLY_STOP_METHODS, "method")] = "asha"
    """How weak trials of a search are ended early."""
    reduction: Annotated[int, Field(ge=2, le=1000)] = 3
    """At each rung, one in this many trials continues; also the ratio of two rungs."""
    first: Count
    """Step of the first rung, for the baseline."""

    def rungs(self, steps: int) -> list[int]:
        """The steps at which trials are compared, all before the last step, `steps`."""
        rungs = (self.first * self.reduction**i for i in count())
        return list(takewhile(lambda rung: rung < steps, rungs))


class Evaluation(DownstreamTasks):
    """Downstream tasks that trials run with their last checkpoint; the scores become metrics."""

    phases: Names = ()
    """The phases whose trials are evaluated; empty: all."""

    def asks(self, phase: str) -> bool:
        """Whether the trials of a phase are evaluated."""
        return not self.phases or phase in self.phases


class Header(Config):
    """The campaign-wide settings: all top-level keys except its name, seeds, base, phases and claims."""

    description: str | None = None
    """The question, shown in the report."""
    metric: Metric = Metric()
    hold: Annotated[str, one_of(HOLDS, "quantity to hold")] = "tokens"
    """The quantity kept equal between arms."""
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95
    """Level of intervals and verdicts."""
    min_effect: Annotated[float, Field(ge=0, le=10**6)] = 0.005
    """Smallest difference that matters, in units of the metric."""
    resources: Resources = Resources()
    noise: Annotated[float, Field(gt=0, le=10**6)] | None = None
    """Expected standard deviation of the metric between seeds, for --plan."""
    budget: Budget = Budget()
    early_stop: EarlyStop | None = None
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class FreshSeeds:
    """`seeds: fresh N`: N seeds that no campaign of this results folder has looked at.

    `seeds: fresh` (n is None) takes as many as find the effect again with 80 % power, `FEWEST_FRESH` to `MOST_FRESH`.
    """

    n: int | None = None

    @property
    def most(self) -> int:
        """The largest number of seeds that the phase may get."""
        return MOST_FRESH if self.n is None else self.n


@dataclass(frozen=True)
class UntilDecided:
    """`seeds: {until: decided, ...}`: rounds of seeds, until every arm is decided (tune/analysis/sequential.py)."""

    start: int = 3  # seeds of the first round
    most: int = 30
    fresh: bool = False  # whether to use seeds that no other phase of the campaign uses


SeedRule = tuple[int, ...] | FreshSeeds | UntilDecided


def count_seeds(rule: SeedRule) -> int:
    """The number of seeds of each arm, or the largest number if it is not fixed."""
    return len(rule) if isinstance(rule, tuple) else rule.most


@dataclass(frozen=True)
class Phase:
    """A baseline and the arms compared with it."""

    name: str
    inherit: str | None  # the phase whose winner is the base of this one; may be a path in another results directory
    pinned: Mapping[str, Any]  # the settings in `set:`, which apply to all arms, by dotted name
    arms: tuple[ArmSpec, ...]  # without the baseline, unless the file lists it
    seeds: SeedRule
    swept: Mapping[str, tuple[Any, ...]]  # the values of each axis, by dotted name
    combine: tuple[str, ...] = ()  # the phases whose better arms are combined
    search: Search | None = None  # set if optuna proposes the arms, batch by batch
    hold: str | None = None  # the quantity kept equal between arms; None: the campaign's
    stops_early: bool = False  # whether `early_stop:` applies
    origins: Mapping[str, Location] = field(default_factory=dict, compare=False)  # where each pinned setting is written
    question: Mapping[str, Any] | None = None  # of its search, optuna or random; see `Search.question`
    has_own_seeds: bool = False  # whether the phase has `seeds:`; otherwise they are the campaign's
    confirms: str | None = None  # the search phase whose best arm this phase compares again, on fresh seeds
    hands_on_best: bool = False  # later phases start from the arm with the best mean, even if none is better
    seed_shift: int = 0  # added to the seeds of a phase that starts from a winner (tune/spec/inherited_seeds.py)

    @property
    def known_seeds(self) -> tuple[int, ...] | None:
        """The seeds that follow from the file alone, all that `until: decided` may use; None if they are fresh."""
        if isinstance(self.seeds, tuple):
            return tuple((seed + self.seed_shift) % (MAX_SEED + 1) for seed in self.seeds)
        if isinstance(self.seeds, UntilDecided) and not self.seeds.fresh:
            return tuple(range(1 + self.seed_shift, 1 + self.seed_shift + self.seeds.most))
        return None

    def with_seeds(self, seeds: tuple[int, ...]) -> "Phase":
        """The phase with a list of seeds, which are not shifted any more."""
        return replace(self, seeds=seeds, seed_shift=0)

    @property
    def sources(self) -> set[str]:
        """The phases whose results this one uses; those in other results directories by their paths."""
        return {name for name in self._named if name}

    @property
    def _named(self) -> tuple[str | None, ...]:
        return (self.inherit, self.confirms, *self.combine, *(arm.inherit for arm in self.arms))

    @property
    def needs(self) -> set[str]:
        """The phases whose winners must be known before this one can start."""
        return {name for name in self.sources if not is_path(name)}


@dataclass(frozen=True)
class Claim:
    """A statement of an earlier report that the recorded trials can test (tune/claims/relations.py).

    `left`, `right` and `parts` select arms by the values of their settings (dotted names) and by the keys `arm` and
    `phase`.
    """

    id: str
    relation: str
    source: str | None = None  # the report that states it
    says: str | None = None
    metric: str = "val_loss"
    goal: str | None = None  # of a metric that a plug-in adds: whether lower or higher values are better
    phase: str | None = None  # None: all
    left: Mapping[str, Any] | None = None
    right: Mapping[str, Any] | None = None
    parts: Sequence[Mapping[str, Any]] | None = None  # the single changes that `left` joins
    setting: str | None = None  # dotted name of the setting that varies
    direction: str | None = None  # how the metric changes as `setting` grows
    value: float | None = None
    tolerance: float | None = None
    expression: str | None = None


@dataclass(frozen=True)
class Campaign:
    """A validated campaign: names are resolved, values are typed, and phases come after those they depend on."""

    name: str
    description: str | None
    metric: Metric
    hold: str  # the quantity kept equal between arms: tokens | steps | seconds
    confidence: float
    min_effect: float  # in units of the metric
    base: TrainConfig
    resources: Resources
    noise: float | None
    budget: Budget
    early_stop: EarlyStop | None
    evaluation: Evaluation | None
    phases: tuple[Phase, ...]
    text: str  # the text of the file
    assignments: tuple[str, ...]  # --set
    # winners inherited from other results directories, by path
    inherited: Mapping[str, InheritedWinner] = field(default_factory=dict)
    # measured speeds, for `hold: seconds` (tune/planning/equal_time.py)
    speeds: Mapping[str, float] = field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    smoke: bool = False  # shrunk by `--smoke`: its results answer nothing
    path: Path | None = None  # of the file, as given
