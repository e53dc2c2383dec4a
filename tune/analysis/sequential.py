"""Seeds until decided: looks at a phase after each round of seeds, and stops each arm once its comparison is settled.

`seeds: {until: decided, start: 3, most: 30}` trains every arm with `start` seeds, looks, and gives more seeds only to
the arms that are still open, up to `most`. Looking often would raise the rate of false verdicts, so the error rate
alpha is spent over the looks by the Pocock-type function alpha * ln(1 + (e - 1) t) of Lan and DeMets (Biometrika 1983),
where t is the share of `most`. The nominal level of each look follows from the joint distribution of the statistics at
all looks (Armitage, McPherson and Rowe 1969; Jennison and Turnbull 2000, ch. 19); the p-values of t tests are compared
with it (Pocock 1977). Over arms, the group-sequential Holm procedure applies (Ye, Li, Liu and Yao, Statistics in
Medicine 2013): it counts all arms of the start that are not yet `better` or `worse`, also those that get no more seeds.

At a look, an open arm is

- `better` or `worse`, if its corrected p is below alpha and its difference is at least `min_effect`;
- `equivalent`, if its interval lies within +-`min_effect`. The interval is a repeated confidence interval (Jennison and
  Turnbull 1989): it holds at all looks together, for one arm;
- `dropped`, if it is clearly behind the leader, the arm with the best mean so far: two-sided p below `DROP`;
- `futile`, if it is unlikely to become `better` by `most` seeds: its conditional power (Lan, Simon and Halperin 1982)
  is below `FUTILE`, for an effect `OPTIMISM` standard errors better than it looks;
- `undecided`, if the seeds are used up; `diverged`, `failed` or `incomplete`, if it lost a trial.

Dropping and futility cannot cause a false `better`, they only cost power; so they use the pooled noise, which has the
most degrees of freedom. The baseline always continues. So does a leader that is already `better`, because the others
are compared with it.

An effect is overestimated if its comparison stops when it looks largest: by 0.1 to 0.3 standard deviations of one trial
in simulations (`python -m tune.bench sequential`). A confirmation on fresh seeds shows the true size.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log10, sqrt
from typing import TypeVar

from tune.analysis.alpha_spending import corrected_for_looks, look_sizes, nominal_levels
from tune.analysis.noise import Comparison, Contrast, Values, compare_arms
from tune.analysis.readings import NoisePrior
from tune.analysis.verdicts import MAX_VALUE, RANK_OF_EXCLUDED, Goal, Judgement, Outcomes, judge
from tune.storage.records import ArmLook, Decision, Look, TrialOutcome
from tune.storage.summaries import ArmSummary, Delta

TrialId = TypeVar("TrialId")

DROP = 0.05  # two-sided p of the difference from the leader, below which an arm is dropped
FUTILE = 0.1  # conditional power below which an arm is futile
OPTIMISM = 2.5  # standard errors by which the effect may be better than it looks, for futility


@dataclass(frozen=True)
class SequentialRule:
    """When to look, and what to decide with."""

    start: int
    most: int
    confidence: float = 0.95
    min_effect: float = 0.005
    goal: Goal = "minimize"
    prior: NoisePrior | None = None  # the noise of earlier phases

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of seeds at each look."""
        return look_sizes(self.start, self.most)


def replay_looks(
    trial_ids: Mapping[str, Sequence[TrialId]],
    seeds: Sequence[int],
    baseline: str,
    rule: SequentialRule,
    outcome: Callable[[TrialId], TrialOutcome],
) -> tuple[list[Look], dict[str, int]]:
    """All looks that the outcomes allow, and the number of seeds that each arm is to be trained with.

    A look is taken once all trials of its round have an outcome, so the order in which they ended does not matter.

    Args:
        trial_ids: by arm, one for each of `seeds`.
    """
    sizes, looks = rule.sizes, list[Look]()
    planned = dict.fromkeys(trial_ids, sizes[0])
    while len(looks) < len(sizes):
        outcomes = {
            arm: {seed: outcome(i) for seed, i in zip(seeds[: planned[arm]], ids, strict=False)}
            for arm, ids in trial_ids.items()
        }
        if any(result.status in ("missing", "stopped") for row in outcomes.values() for result in row.values()):
            break
        looks.append(take_look(outcomes, baseline, rule, looks))
        if not looks[-1].runs_on:
            break
        planned |= dict.fromkeys(looks[-1].runs_on, sizes[len(looks)])
    return looks, planned


def take_look(outcomes: Outcomes, baseline: str, rule: SequentialRule, earlier: Sequence[Look]) -> Look:
    """Judges the arms that were still open after the `earlier` looks, by all values so far."""
    return _Looking(outcomes, baseline, rule, earlier).look()


@dataclass
class _Looking:
    """What one look needs to know."""

    outcomes: Outcomes
    baseline: str
    rule: SequentialRule
    earlier: Sequence[Look]

    def __post_init__(self) -> None:
        rule, self.number, self.known = self.rule, len(self.earlier), last_looks(self.earlier)
        self.sign = -1.0 if rule.goal == "maximize" else 1.0
        self.alpha, self.seeds = 1 - rule.confidence, rule.sizes[self.number]
        self.is_last = self.seeds == rule.sizes[-1]
        self.level = nominal_levels(rule.sizes, self.alpha)[self.number]
        self.values, self.lost = _finished_values(self.outcomes, self.baseline)
        can_compare = self.baseline in self.values and len(self.values) > 1
        comparison = None
        if can_compare:
            comparison = compare_arms(self.values, self.baseline, 1 - self.level, prior=rule.prior)
        self.contrasts = comparison.contrasts if comparison else {}
        decisions = {arm: row.decision for arm, row in self.known.items()}
        self.open = [arm for arm in self.outcomes if arm != self.baseline and decisions.get(arm) is None]
        gains = {self.baseline: 0.0} | {arm: self.gain(arm) for arm in self.contrasts}
        self.leader = max((arm for arm in gains if decisions.get(arm) in (None, "better")), key=gains.__getitem__)
        self.behind = comparison
        if comparison and self.leader != self.baseline:
            self.behind = compare_arms(self.values, self.leader, rule.confidence)
        n_rejected = sum(decision in ("better", "worse") for decision in decisions.values())
        self.hypotheses = len(self.outcomes) - 1 - n_rejected
        p = {arm: self.contrasts[arm].p for arm in self.open if arm in self.contrasts}
        self.corrected = _corrected(rule.sizes, self.number, p, self.hypotheses)

    def gain(self, arm: str) -> float:
        """The improvement of an arm over the baseline."""
        return -self.sign * self.contrasts[arm].difference

    def look(self) -> Look:
        """The decisions on the open arms, and the arms that get more seeds."""
        rows = [self._row(arm, *self._decide(arm)) for arm in self.open]
        if self.leader not in (self.baseline, *self.open):  # runs along although it is decided
            rows.append(self._row(self.leader, self.known[self.leader].decision, self.known[self.leader].why))
        is_open = {row.arm for row in rows if row.decision is None}
        is_better = {row.arm for row in rows if row.decision == "better"}
        runs_on = is_open | {self.baseline} | (is_better & {self.leader}) if is_open else ()
        names = tuple(arm for arm in self.outcomes if arm in runs_on)
        return Look(self.number + 1, self.seeds, self.level, self.leader, tuple(rows), names)

    def _decide(self, arm: str) -> tuple[Decision | None, str]:
        """The decision on an open arm, and why; None if it remains open."""
        if arm in self.lost:
            return self.lost[arm], "it lost a trial"
        if (contrast := self.contrasts.get(arm)) is None:
            return "undecided", "the baseline has too few results"
        least, gain = self.rule.min_effect, self.gain(arm)
        # Without its worst seeds, the baseline looks better than it is.
        is_biased = any(outcome.status == "diverged" for outcome in self.outcomes[self.baseline].values())
        if self.corrected[arm] < self.alpha and abs(gain) >= least * (1 - 1e-9) and gain:
            if gain > 0:
                return "better", ""
            if not is_biased:
                return "worse", ""
        if abs(gain) + contrast.half_width <= least * (1 + 1e-9) and not is_biased:
            return "equivalent", f"its interval lies within ±{least:g}"
        if self.is_last:
            return "undecided", "the seeds are used up"
        if arm != self.leader and self._is_clearly_behind(arm):
            return "dropped", f"clearly behind {self.leader}"
        if self._conditional_power(arm) < FUTILE:
            return "futile", f"unlikely to become better by {self.rule.most} seeds"
        return None, ""

    def _is_clearly_behind(self, arm: str) -> bool:
        """Whether an arm is worse than the leader by more than noise."""
        from scipy.special import stdtr

        assert self.behind is not None, "the arm was compared"
        is_baseline, pooled = self.leader == self.baseline, self.behind.pooled
        contrast = self.contrasts[arm] if is_baseline else self.behind.contrasts[arm]
        error = self._error(self.behind, arm, contrast)
        if self.sign * contrast.difference <= 0 or not error:
            return self.sign * contrast.difference > 0
        return 2 * float(stdtr(pooled.df, -abs(contrast.difference) / error)) < DROP

    def _error(self, comparison: Comparison, arm: str, contrast: Contrast) -> float:
        """The standard error for dropping and futility: from the pooled noise, if the arm belongs to it."""
        is_gross = comparison.noise[arm].is_gross or comparison.method == "unpaired"
        return contrast.standard_error if is_gross else sqrt(2 * comparison.pooled.value / contrast.n)

    def _conditional_power(self, arm: str) -> float:
        """The chance that an arm becomes better at the last look, if it is `OPTIMISM` standard errors better."""
        from scipy.special import ndtr, ndtri

        assert self.behind is not None, "the arm was compared"
        if not (error := self._error(self.behind, arm, self.contrasts[arm])):
            return 0.0
        share, z = self.seeds / self.rule.most, self.gain(arm) / error
        bound = -ndtri(nominal_levels(self.rule.sizes, self.alpha / self.hypotheses)[-1] / 2)
        drift = (z + OPTIMISM) / sqrt(share)  # the expected z at the end
        return float(ndtr((z * sqrt(share) + drift * (1 - share) - bound) / sqrt(1 - share)))

    def _row(self, arm: str, decision: Decision | None, why: str) -> ArmLook:
        n, contrast = len(self.values.get(arm, ())), self.contrasts.get(arm)
        if contrast is None:
            return ArmLook(arm, n, decision=decision, why=why)
        low, high = contrast.difference - contrast.half_width, contrast.difference + contrast.half_width
        p = self.corrected[arm] if arm in self.corrected else self.known[arm].p_corrected
        return ArmLook(arm, n, contrast.difference, low, high, contrast.p, p, decision, why)


def last_looks(looks: Sequence[Look]) -> dict[str, ArmLook]:
    """The newest look at each arm."""
    return {row.arm: row for look in looks for row in look.arms}


def _finished_values(outcomes: Outcomes, baseline: str) -> tuple[Values, dict[str, Decision]]:
    """The values by arm and seed, and what happened to arms that lost a trial; those and single values are left out."""
    values, lost = Values(), dict[str, Decision]()
    for arm, row in outcomes.items():
        sample = {
            seed: float(result.value)
            for seed, result in row.items()
            if result.status == "finished" and result.value is not None and abs(result.value) < MAX_VALUE
        }
        statuses = {result.status for result in row.values()}
        if len(sample) < len(row) and arm != baseline:
            lost[arm] = "diverged" if "diverged" in statuses else "failed" if "failed" in statuses else "incomplete"
        elif len(sample) > 1:
            values[arm] = sample
    return values, lost


def _corrected(sizes: tuple[int, ...], number: int, p: Mapping[str, float], hypotheses: int) -> dict[str, float]:
    """Corrects for the looks, then over `hypotheses` by Holm's step-down procedure."""
    corrected, largest = dict[str, float](), 0.0
    for i, arm in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (hypotheses - i) * corrected_for_looks(sizes, number, p[arm])))
        corrected[arm] = largest
    return corrected


# ---- the verdicts --------------------------------------------------------------------------------------------------

OUT = ("dropped", "futile", "undecided")  # decisions that leave the verdict `undecided`


def is_over(looks: Sequence[Look]) -> bool:
    """Whether no arm gets more seeds."""
    return bool(looks) and not looks[-1].runs_on


def judge_by_looks(
    outcomes: Outcomes,
    looks: Sequence[Look],
    *,
    baseline: str,
    goal: Goal = "minimize",
    confidence: float = 0.95,
    min_effect: float = 0.005,
    metric: str = "val_loss",
    prior: NoisePrior | None = None,
) -> Judgement:
    """The verdicts of a phase with `until: decided`: those of the looks, and otherwise the same as those of `judge`.

    The difference, interval and p of an arm are those of the last look at it.
    """
    judgement = judge(
        outcomes,
        baseline=baseline,
        goal=goal,
        confidence=confidence,
        min_effect=min_effect,
        metric=metric,
        prior=prior,
    )
    last, sign = last_looks(looks), -1.0 if goal == "maximize" else 1.0
    arms = [_with_look(arm, last[arm.arm]) if arm.arm in last else arm for arm in judgement.arms]
    arms.sort(key=lambda arm: (arm.verdict in RANK_OF_EXCLUDED, sign * arm.delta.mean if arm.delta else 0.0))
    winner = next((arm.arm for arm in arms if arm.verdict == "better"), baseline)
    if winner != judgement.winner:
        values = _finished_values(outcomes, baseline)[0]
        others = compare_arms(values, winner, confidence).contrasts
        tied = {arm for arm, contrast in others.items() if abs(contrast.difference) <= contrast.half_width}
        arms = [replace(arm, tied_with_winner=arm.arm in tied) for arm in arms]
    why = _why(arms, looks, winner, metric) if is_over(looks) and len(arms) > 1 else judgement.why
    warnings = [warning for warning in judgement.warnings if not warning.startswith("the arms ran different seeds")]
    return replace(judgement, arms=arms, winner=winner, why=why, warnings=warnings)


def _with_look(arm: ArmSummary, row: ArmLook) -> ArmSummary:
    verdict = "undecided" if row.decision is None or row.decision in OUT else row.decision
    numbers = {"ci_low": row.ci_low, "ci_high": row.ci_high, "p": row.p, "p_holm": row.p_corrected}
    delta = None if row.delta is None else replace(arm.delta or Delta(0.0), mean=row.delta, **numbers)
    return replace(arm, verdict=verdict, delta=delta, seeds_to_decide=None, decision=describe_decision(row))


def describe_decision(row: ArmLook) -> str:
    """What a look decided about an arm: `dropped after 5 seeds: clearly behind alpha=0.2`."""
    text = f"{row.decision or 'open'} after {row.n} seeds"
    return f"{text}: {row.why}" if row.why else text


def look_text(look: Look) -> str:
    """What a look decided, in one line: `look 2, 4 seeds: alpha=0.2 better; 3 dropped; 2 arms go on`."""
    decided = [row for row in look.arms if row.decision]
    better = [f"{row.arm} better" for row in decided if row.decision == "better"]
    counts = Counter(row.decision for row in decided if row.decision != "better")
    n_open = len(look.arms) - len(decided)
    rest = f"{n_open} arm{'s go' if n_open > 1 else ' goes'} on" if n_open else "every arm is decided"
    parts = [*better, *(f"{count} {decision}" for decision, count in counts.items()), rest]
    return f"look {look.number}, {look.seeds} seeds: {'; '.join(parts)}"


def _why(arms: Sequence[ArmSummary], looks: Sequence[Look], winner: str, metric: str) -> str:
    """The result of the phase in one sentence."""
    decisions = Counter(row.decision for row in last_looks(looks).values() if row.arm != winner)
    others = ", ".join(f"{count} {decision}" for decision, count in decisions.items())
    best = next(arm for arm in arms if arm.arm == winner)
    if best.delta is None or best.verdict != "better":
        return f"no arm is better than the baseline, so the baseline stays: {others}"
    low, high = sorted((abs(best.delta.ci_low or 0.0), abs(best.delta.ci_high or 0.0)))
    digits = min(max(1 - floor(log10((high - low) / 2 or abs(best.delta.mean) / 10)), 0), 12)
    verb = "lowers" if best.delta.mean < 0 else "raises"
    text = f"{winner} {verb} {metric} by {abs(best.delta.mean):.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    text += f" ({best.n} paired seeds, p {best.delta.p_holm or 0.0:.2g}, corrected for arms and looks)"
    return f"{text}; the others: {others}" if others else text
