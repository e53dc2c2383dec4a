"""`compare`: two results directories side by side, with the difference of every arm that both have.

Arms are matched by what their trials compute, not by name: by the settings of their records, without the seed. What
cannot be compared is refused with the reason: losses over different tokens, for example, say nothing about arms.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ngpt.config.base import is_identity, settings
from ngpt.training.config import TrainConfig
from tune.analysis.verdicts import holm, judge
from tune.results.comparability import Results, check_data, choose_objective, data_settings, read_results
from tune.results.phase_summary import mean, phase_records
from tune.storage.records import TrialOutcome
from tune.storage.summaries import Delta, Objective, TrialRecord, to_json

EXACT = ("val_loss", "val_bpb", "train_loss")  # equal in all digits: the same computation
IDENTICAL = "identical in every trial"

Differing = Mapping[str, Sequence[Any]]  # [a, b] by name; null where one side lacks it


@dataclass(frozen=True)
class ComparedResults:
    """One of the two results directories."""

    results: str
    status: str
    started_at: str
    environment: Mapping[str, Any]
    campaign: str
    description: str | None
    metric: Mapping[str, str]
    data: Mapping[str, Any]
    workers: int
    command: str


@dataclass(frozen=True)
class Sides:
    """A number of each side."""

    a: float | None
    b: float | None


@dataclass(frozen=True)
class Throughput(Sides):
    """Tokens per second; no ratio where the trials shared the machine differently."""

    ratio: float | None  # b over a


@dataclass(frozen=True)
class ArmComparison:
    """An arm that both sides have: `delta` is b minus a."""

    a: Sequence[str]  # its names, as phase/arm
    b: Sequence[str]
    seeds: Sequence[int]  # that both sides ran
    paired: bool
    n: Sides  # finished trials
    score: Sides  # their mean
    delta: Delta | None
    identical: bool  # in every digit of every trial
    lost: Sequence[str]  # such as `diverged in B`
    tokens_per_second: Throughput
    verdict: str = "no claim"


@dataclass(frozen=True)
class Comparison:
    """What two results directories share, what differs, and the difference of each arm that both have."""

    a: ComparedResults
    b: ComparedResults
    metric: Objective
    confidence: float
    min_effect: float
    environment: Differing
    data: Differing
    base: Differing
    code: Differing
    arms: Sequence[ArmComparison]
    only_a: Sequence[Sequence[str]]  # names of arms
    only_b: Sequence[Sequence[str]]
    throughput_note: str | None


@dataclass
class ArmTrials:
    """The trials of one configuration in one results directory, in whichever phases they are."""

    names: list[str] = field(default_factory=list)  # phase/arm
    records: dict[int, TrialRecord] = field(default_factory=dict)  # by seed


def compare(first: Path, second: Path, *, metric: str | None = None) -> Comparison:
    """Compares two results directories: the differences are `second` minus `first`.

    Differences are paired over the seeds that both have finished; without shared seeds two samples are compared.
    P-values are Holm-corrected over the arms. `metric` defaults to that of the campaigns.

    Raises:
        ConfigError: there is no campaign, or the two cannot be compared; the message says why and what can be.
        OSError: a file cannot be read.
    """
    a, b = read_results(first), read_results(second)
    objective = choose_objective(a, b, metric)
    check_data(a, b, objective.name)
    ignored = data_settings(a, b)
    left, right = _arms(a, ignored), _arms(b, ignored)
    confidence, min_effect = (
        max(side.state.campaign[rule] for side in (a, b)) for rule in ("confidence", "min_effect")
    )
    note = _throughput_note(a, b)
    shared = [(arm, right[key]) for key, arm in left.items() if key in right]
    arms = [_compare_arm(*sides, objective, confidence, with_ratio=note is None) for sides in shared]
    return Comparison(
        a=_about(a),
        b=_about(b),
        metric=objective,
        confidence=confidence,
        min_effect=min_effect,
        environment=_differences(a.state.environment, b.state.environment),
        data=_differences(a.data, b.data),
        base=_differences(a.base, b.base),
        code=_differences(_code(left), _code(right)),
        arms=_judge_all(arms, objective.goal, 1 - confidence, min_effect),
        only_a=[arm.names for key, arm in left.items() if key not in right],
        only_b=[arm.names for key, arm in right.items() if key not in left],
        throughput_note=note,
    )


# ---- arms ----------------------------------------------------------------------------------------------------------


def _arms(side: Results, ignored: set[str]) -> dict[str, ArmTrials]:
    """Arms by the settings that decide what their trials compute and that are not the default."""
    defaults = {name: to_json(info.default) for name, info in settings(TrainConfig).items()}
    identity = {name for name in defaults if is_identity(TrainConfig, name)}
    arms: dict[str, ArmTrials] = {}
    for phase in side.state.phases.values():
        for record in phase_records(side.state, phase):
            config = {
                name: value
                for name, value in record.config.items()
                if name != "seed"
                and name not in ignored
                and (name not in defaults or (name in identity and value != defaults[name]))
            }
            arm = arms.setdefault(json.dumps(config, sort_keys=True), ArmTrials())
            name = f"{phase.name}/{record.arm}"
            if name not in arm.names:
                arm.names.append(name)
            arm.records.setdefault(record.seed, record)
    return arms


def _compare_arm(
    a: ArmTrials, b: ArmTrials, metric: Objective, confidence: float, *, with_ratio: bool
) -> ArmComparison:
    shared = sorted(a.records.keys() & b.records.keys())
    finished: dict[str, dict[int, TrialOutcome]] = {}
    lost = []
    for name, arm in (("a", a), ("b", b)):
        records = [arm.records[seed] for seed in shared] or list(arm.records.values())
        finished[name] = {
            record.seed: TrialOutcome("finished", record.metrics.get(metric.name))
            for record in records
            if record.status == "finished"
        }
        lost += [f"{status} in {name.upper()}" for status in sorted({r.status for r in records} - {"finished"})]
    judgement = judge(
        finished,
        baseline="a",
        goal="maximize" if metric.goal == "maximize" else "minimize",
        confidence=confidence,
        metric=metric.name,
        method="paired" if shared else "pooled",
    )
    delta = next(arm.delta for arm in judgement.arms if arm.arm == "b")
    scores = [mean(outcome.value for outcome in finished[name].values()) for name in "ab"]
    return ArmComparison(
        a=a.names,
        b=b.names,
        seeds=shared,
        paired=bool(shared),
        n=Sides(len(finished["a"]), len(finished["b"])),
        score=Sides(*scores),
        delta=None if lost else delta,
        identical=bool(shared) and all(_is_equal(a.records[seed], b.records[seed]) for seed in shared),
        lost=lost,
        tokens_per_second=_throughput(a, b, with_ratio=with_ratio),
    )


def _is_equal(a: TrialRecord, b: TrialRecord) -> bool:
    return a.status == b.status != "failed" and all(a.metrics.get(name) == b.metrics.get(name) for name in EXACT)


def _judge_all(arms: Sequence[ArmComparison], goal: str, alpha: float, min_effect: float) -> list[ArmComparison]:
    """Corrects the p-values over all arms and adds the verdicts, of B against A."""
    corrected = iter(holm([arm.delta.p for arm in arms if arm.delta and arm.delta.p is not None]))
    judged = []
    for arm in arms:
        if arm.delta and arm.delta.p is not None:
            arm = replace(arm, delta=replace(arm.delta, p_holm=next(corrected)))
        judged.append(replace(arm, verdict=_verdict(arm, goal, alpha, min_effect)))
    return judged


def _verdict(arm: ArmComparison, goal: str, alpha: float, min_effect: float) -> str:
    if arm.identical:
        return IDENTICAL
    if arm.lost:
        return ", ".join(arm.lost)
    delta = arm.delta
    if delta is None or delta.p_holm is None:
        return "no claim"
    if delta.p_holm >= alpha or abs(delta.mean) < min_effect * (1 - 1e-9):
        return "tie"
    return "B better" if (delta.mean < 0) == (goal == "minimize") else "A better"


def _throughput(a: ArmTrials, b: ArmTrials, *, with_ratio: bool) -> Throughput:
    left, right = (mean(own.metrics.get("tokens_per_second") for own in arm.records.values()) for arm in (a, b))
    return Throughput(left, right, right / left if with_ratio and left and right is not None else None)


def _throughput_note(a: Results, b: Results) -> str | None:
    """Why throughputs have no ratio: trials that share a device or a process are slower than others."""
    at_once = []
    for side in (a, b):
        workers, results = side.state.campaign["workers"], side.state.results.values()
        group = max((result["provenance"].get("vectorised", 1) for result in results), default=1)
        at_once.append(f"{workers} x {group}" if group > 1 else f"{workers}")
    if at_once[0] == at_once[1]:
        return None
    return f"no throughput ratio: {at_once[0]} trials ran at a time in A, {at_once[1]} in B"


# ---- facts ---------------------------------------------------------------------------------------------------------


def _about(side: Results) -> ComparedResults:
    campaign = side.state.campaign
    kept = ("campaign", "description", "metric", "data", "workers", "command")
    return ComparedResults(
        results=str(side.root),
        status=side.state.status,
        started_at=side.state.started,
        environment=side.state.environment,
        **{name: campaign[name] for name in kept},
    )


def _code(arms: Mapping[str, ArmTrials]) -> dict[str, Any]:
    known = [record.provenance for arm in arms.values() for record in arm.records.values()]
    return {
        name: ", ".join(sorted({str(provenance[name]) for provenance in known if name in provenance}))
        for name in ("code_sha256", "threads")
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}
