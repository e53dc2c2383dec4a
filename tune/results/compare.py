"""`compare`: two results directories side by side, with the score difference of every arm that both have.

Arms are matched by the settings of their trials, without the seed; `compare_effects` matches them by name. Comparisons
that would be meaningless, such as losses over different tokens, are rejected with the reason.
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
from tune.results.phase_summary import mean, phase_records, summarize_phase
from tune.spec.metrics import LOSS_METRICS
from tune.storage.records import TrialOutcome
from tune.storage.summaries import Delta, Objective, TrialRecord, to_json

IDENTICAL = "identical in every trial"

Differing = Mapping[str, Sequence[Any]]  # name to [value in a, value in b]; None where one side lacks the name


@dataclass(frozen=True)
class Sides:
    """One number for each side."""

    a: float | None
    b: float | None


@dataclass(frozen=True)
class Throughput(Sides):
    """Tokens per second. The ratio is None if the two sides ran different numbers of concurrent trials."""

    ratio: float | None  # b divided by a


@dataclass(frozen=True)
class ArmComparison:
    """An arm that both sides have; `delta` is b minus a."""

    a: Sequence[str]  # its names, as phase/arm
    b: Sequence[str]
    seeds: Sequence[int]  # run by both sides
    paired: bool
    n: Sides  # finished trials
    score: Sides  # mean over the finished trials
    delta: Delta | None
    identical: bool  # in every digit of every trial
    lost: Sequence[str]  # trials that did not finish, such as `diverged in B`
    tokens_per_second: Throughput
    verdict: str = "no claim"


@dataclass(frozen=True)
class Comparison:
    """Settings in which two results directories differ, and the comparison of each arm that both have."""

    a: Mapping[str, Any]  # facts about the first results directory, such as its campaign, status and command
    b: Mapping[str, Any]
    metric: Objective
    confidence: float
    min_effect: float
    environment: Differing
    data: Differing
    base: Differing
    code: Differing
    arms: Sequence[ArmComparison]
    only_a: Sequence[Sequence[str]]  # names of each arm that b lacks
    only_b: Sequence[Sequence[str]]  # names of each arm that a lacks
    throughput_note: str | None


@dataclass(frozen=True)
class Effect:
    """An arm against the baseline of its own phase."""

    n: int  # finished seeds
    delta: Delta | None  # None for the baseline, and without a difference
    verdict: str


@dataclass(frozen=True)
class EffectPair:
    """Two arms of the same name in phases of the same name."""

    name: str  # as phase/arm
    a: Effect
    b: Effect
    same_settings: bool  # whether both have the same overrides of their bases


@dataclass(frozen=True)
class EffectComparison:
    """The effects of the arms in two results directories side by side, matched by name."""

    a: Mapping[str, Any]  # facts about the first results directory
    b: Mapping[str, Any]
    metric: Objective
    arms: Sequence[EffectPair]
    only_a: Sequence[str]  # phase/arm without a partner in b
    only_b: Sequence[str]
    notes: Sequence[str]  # what makes the two effects hard to compare


@dataclass
class ArmTrials:
    """The trials with the same settings in one results directory, over all phases."""

    names: list[str] = field(default_factory=list)  # phase/arm
    records: dict[int, TrialRecord] = field(default_factory=dict)  # by seed


def compare(first: Path, second: Path, *, metric: str | None = None) -> Comparison:
    """Compares two results directories; all differences are `second` minus `first`.

    Differences are paired by seed. Arms without shared seeds are compared as two independent samples. P-values are
    Holm-corrected over the arms. `metric` defaults to the metric of the campaigns.

    Raises:
        ConfigError: a directory has no campaign, or the two cannot be compared; the message gives the reason.
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
        a=_describe(a),
        b=_describe(b),
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


def compare_effects(first: Path, second: Path) -> EffectComparison:
    """Lays the effect of each arm in `first` beside that of the arm of the same phase and name in `second`.

    Each effect is a difference from the baseline of its own phase, as its campaign has judged it, so the two may have
    other settings, seeds and data. They are not tested against each other.

    Raises:
        ConfigError: a directory has no campaign, or the campaigns have other metrics.
        OSError: a file cannot be read.
    """
    a, b = read_results(first), read_results(second)
    objective = choose_objective(a, b, None)
    left, right = _effects(a), _effects(b)
    shared = [name for name in left if name in right]
    notes = []
    if a.data["eval_sha256"] != b.data["eval_sha256"]:
        notes.append("the evaluation tokens differ, so equal effects may be unequal numbers")
    if others := [name for name in shared if left[name][1] != right[name][1]]:
        notes.append(f"other settings under the same name: {', '.join(others[:8])}{', ...' if others[8:] else ''}")
    return EffectComparison(
        a=_describe(a),
        b=_describe(b),
        metric=objective,
        arms=[EffectPair(n, left[n][0], right[n][0], left[n][1] == right[n][1]) for n in shared],
        only_a=[name for name in left if name not in right],
        only_b=[name for name in right if name not in left],
        notes=notes,
    )


def _effects(side: Results) -> dict[str, tuple[Effect, Mapping[str, Any]]]:
    """The effect of each arm with its overrides, by phase/arm."""
    phases = [summarize_phase(side.state, phase) for phase in side.state.phases.values()]
    return {
        f"{phase.phase}/{arm.arm}": (Effect(arm.n, arm.delta, arm.verdict), {**phase.base, **arm.overrides})
        for phase in phases
        for arm in phase.arms
    }


def _arms(side: Results, ignored: set[str]) -> dict[str, ArmTrials]:
    """Groups trials by the non-default settings that determine their results, encoded as JSON."""
    defaults = {name: to_json(info.default) for name, info in settings(TrainConfig).items()}
    skipped = {*ignored, "seed"} | {name for name in defaults if not is_identity(TrainConfig, name)}
    arms: dict[str, ArmTrials] = {}
    for phase in side.state.phases.values():
        for record in phase_records(side.state, phase):
            config = {name: value for name, value in record.config.items() if name not in skipped}
            config = {name: value for name, value in config.items() if name not in defaults or value != defaults[name]}
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
        method="paired" if shared else "unpaired",
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
    """Whether two trials ended alike, with losses that are equal in every digit."""
    return a.status == b.status != "failed" and all(a.metrics.get(name) == b.metrics.get(name) for name in LOSS_METRICS)


def _judge_all(arms: Sequence[ArmComparison], goal: str, alpha: float, min_effect: float) -> list[ArmComparison]:
    """Holm-corrects the p-values over all arms and adds the verdicts on B against A."""
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
    if delta.p_holm < alpha and abs(delta.mean) >= min_effect * (1 - 1e-9) and delta.mean:
        return "B better" if (delta.mean < 0) == (goal == "minimize") else "A better"
    is_within = max(-(delta.ci_low or 0.0), delta.ci_high or 0.0) <= min_effect * (1 + 1e-9)
    return "equivalent" if is_within else "undecided"


def _throughput(a: ArmTrials, b: ArmTrials, *, with_ratio: bool) -> Throughput:
    left, right = (mean(record.metrics.get("tokens_per_second") for record in arm.records.values()) for arm in (a, b))
    return Throughput(left, right, right / left if with_ratio and left and right is not None else None)


def _throughput_note(a: Results, b: Results) -> str | None:
    """Explains a missing throughput ratio: speeds differ if the sides ran different numbers of concurrent trials."""
    concurrency = []
    for side in (a, b):
        workers, results = side.state.campaign["workers"], side.state.results.values()
        group_size = max((result["provenance"].get("vectorised", 1) for result in results), default=1)
        n_ranks = max((result["provenance"].get("ranks", 1) for result in results), default=1)
        count = f"{workers} x {group_size}" if group_size > 1 else f"{workers}"
        concurrency.append(f"{count} (of {n_ranks} ranks)" if n_ranks > 1 else count)
    if concurrency[0] == concurrency[1]:
        return None
    return f"no throughput ratio: {concurrency[0]} trials ran at a time in A, {concurrency[1]} in B"


def _describe(side: Results) -> dict[str, Any]:
    state, copied = side.state, ("campaign", "description", "metric", "data", "workers", "command")
    facts = {"results": str(side.root), "status": state.status, "started_at": state.started}
    return facts | {"environment": state.environment} | {name: state.campaign[name] for name in copied}


def _code(arms: Mapping[str, ArmTrials]) -> dict[str, Any]:
    provenances = [record.provenance for arm in arms.values() for record in arm.records.values()]
    return {
        name: ", ".join(sorted({str(provenance[name]) for provenance in provenances if name in provenance}))
        for name in ("code_sha256", "threads")
    }


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*a, *b])
    return {name: [a.get(name), b.get(name)] for name in names if a.get(name) != b.get(name)}
