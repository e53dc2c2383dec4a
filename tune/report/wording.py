"""Describes results in words, for the terminal, the HTML report and the Markdown report."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import floor, log10
from typing import Any, NamedTuple

from ngpt.config.base import ConfigError, build, override
from tune import format as fmt
from tune.analysis.importance import axis_importance, is_number, sweep_axes
from tune.analysis.power import MAX_SEEDS
from tune.storage.summaries import (
    ArmSummary,
    CampaignSummary,
    Delta,
    MetricSpread,
    PhaseSummary,
    Spread,
    TrialCounts,
    TrialProblem,
)

# Every verdict on an arm, as the "how to read" section explains it.
VERDICTS = {
    "baseline": "The setting that every other arm of its phase is compared with, seed by seed.",
    "better": "Improves on the baseline: the corrected p is below one minus the confidence, and the effect is at least "
    "the smallest one that matters.",
    "worse": "Loses to the baseline, by the same two tests.",
    "equivalent": "Its interval lies within plus or minus the smallest effect that matters: what varies makes no "
    "difference that matters.",
    "undecided": "The interval is too wide to tell. With the seeds that it names, four of five phases would decide, if "
    "the true effect is as measured.",
    "no claim": "One seed only: a number, but no spread to judge it by.",
    "incomplete": "Some of its seeds have not finished, or were stopped early, so it is not judged.",
    "diverged": "At least one seed ended with a loss that is not finite, or more than twice an untrained model's. That "
    "is a result, and it ranks last.",
    "failed": "At least one trial ended with an error, which is listed under what went wrong.",
}

# Every verdict on a claim.
CLAIM_VERDICTS = {
    "reproduced": "The records say the same, beyond the noise.",
    "refuted": "The records say the opposite, or that no effect large enough to matter exists, beyond the noise.",
    "undecided": "Neither: too few seeds, too much noise, too small an effect, or trials that did not finish.",
    "no data": "No trial so far can say anything about it.",
}
CLAIMS_NOTE = (
    "A claim is judged at the confidence of the campaign, by paired differences over the seeds. Claims are not "
    "corrected for their number: at 95 %, up to one in forty wrong claims is reproduced by chance."
)

# What to print for a trial that left no error message.
ENDINGS = {"diverged": "its loss became non-finite", "stopped": "the campaign stopped before the trial ended"}


def half_width(spread: Spread | Delta | None) -> float | None:
    """Returns half the width of a confidence interval; None without an interval."""
    if spread is None or spread.ci_low is None or spread.ci_high is None:
        return None
    return (spread.ci_high - spread.ci_low) / 2


def mean_interval(spread: Spread) -> str:
    """Formats a mean over seeds with half the width of its interval: `4.3211 ± 0.0123`."""
    half = half_width(spread)
    number = partial(fmt.number, decimals=decimals(half or abs(spread.mean or 0)))
    return number(spread.mean) + ("" if spread.mean is None or half is None else f" ± {number(half)}")


def decimals(size: float | None) -> int:
    """The decimals of a number whose interval is that wide: four as for losses, more if these would hide it."""
    return 4 if not size or size >= 5e-5 else min(1 - floor(log10(size)), 12)


def effect(delta: Delta | None) -> str:
    """Formats a difference from the baseline with its confidence interval: `-0.0123 [-0.0150, -0.0096]`."""
    if delta is None:
        return fmt.MISSING
    low, high, signed = delta.ci_low, delta.ci_high, partial(fmt.signed, decimals=decimals(half_width(delta)))
    interval = "" if low is None or high is None else f" [{signed(low)}, {signed(high)}]"
    return signed(delta.mean) + interval


def interval_name(confidence: float) -> str:
    """Names a confidence interval: `95 % interval`."""
    return f"{100 * confidence:g} % interval"


def noise(phase: PhaseSummary) -> str:
    """Describes the noise between the seeds of a phase and the smallest effect that it can detect."""
    estimate = phase.noise
    if estimate.sd is None:
        return "Noise unknown: it takes two finished seeds of the baseline."
    text = f"Noise: sd {fmt.number(estimate.sd)}" + (f" ({fmt.plain(estimate.method)})" if estimate.method else "")
    if estimate.correlation is not None:
        text += f", correlation between arms over seeds {fmt.number(estimate.correlation, 2)}"
    if estimate.smallest_detectable is not None:
        text += f", smallest detectable effect {fmt.number(estimate.smallest_detectable)}"
    return f"{text}.{_text_error(phase)}"


def _text_error(phase: PhaseSummary) -> str:
    """Describes the uncertainty of the evaluation text, which the intervals over seeds do not cover."""
    errors = [arm.text_se for arm in phase.arms if arm.text_se is not None]
    if not errors:
        return ""
    size = " to ".join(dict.fromkeys((fmt.number(min(errors)), fmt.number(max(errors)))))
    return (
        f" The choice of the evaluation text adds a standard error of {size} to the differences, beside that of seeds."
    )


def trial_counts(counts: TrialCounts) -> str:
    """Formats the trials of a phase: `29 trials (27 finished, 2 diverged)`; `29 trials` if all finished."""
    parts = [f"{getattr(counts, name)} {name}" for name in ("finished", "diverged", "failed", "stopped")]
    parts = [part for part in parts if not part.startswith("0 ")] if counts.finished != counts.total else []
    parts += [f"{counts.reused} reused"] if counts.reused else []
    return fmt.counted(counts.total, "trial") + (f" ({', '.join(parts)})" if parts else "")


def seed_counts(phase: PhaseSummary) -> str:
    """Formats the number of seeds of a phase's arms: `3 seeds`, `3 to 12 seeds`."""
    sizes = sorted({len(arm.trial_ids) for arm in phase.arms if arm.trial_ids})
    if phase.most_seeds is None or len(sizes) < 2:
        return fmt.counted(len(phase.seeds), "seed")
    return f"{sizes[0]} to {sizes[-1]} seeds"


class MetricTable(NamedTuple):
    """The metrics of a phase that no verdict depends on, an arm a row."""

    names: list[str]
    rows: list[tuple[str, list[str]]]  # name of the arm, and a text for each metric
    note: str


def metric_table(phase: PhaseSummary) -> MetricTable | None:
    """The means of further metrics, with half of their intervals; None if there are none."""
    names = list(dict.fromkeys(name for arm in phase.arms for name, spread in arm.metrics.items() if spread.n))
    names = [name for name in names if name != phase.metric.name]
    if not names:
        return None

    def text(arm: ArmSummary, name: str) -> str:
        spread = arm.metrics.get(name, MetricSpread())
        return mean_interval(spread) + (f" ({spread.n} of {arm.n})" if 0 < spread.n < arm.n else "")

    rows = [(arm.arm, [text(arm, name) for name in names]) for arm in phase.arms]
    note = f"Mean over the seeds of an arm ± half of its own {interval_name(phase.confidence)}. No verdict uses it."
    return MetricTable(names, rows, note)


class Rounds(NamedTuple):
    """What `until: decided` did in a phase, in words."""

    saving: str
    note: str
    decisions: list[str]  # one line for each arm: what was decided, and when


def rounds(phase: PhaseSummary) -> Rounds | None:
    """Describes the looks at a phase; None without looks."""
    if not phase.looks or phase.fixed_trials is None:
        return None
    total, fixed = phase.trials.total, phase.fixed_trials
    looks = fmt.listing((str(look.seeds) for look in phase.looks), most=len(phase.looks))
    every = f"{phase.most_seeds} seeds for every arm would be {fixed}"
    plan = "planned so far" if phase.looks[-1].runs_on else f"{1 - total / fixed:.0%} saved"
    saving = f"Decided in rounds, after {looks} seeds: {total} of {fixed} trials, {plan} ({every})."
    note = "Intervals hold at all looks together. An arm that stops when its effect looks largest is overestimated, on "
    note += "average by 0.1 to 0.3 standard deviations of a trial"
    note += f" (up to {fmt.number(0.3 * phase.noise.sd)} here)" if phase.noise.sd else ""
    decisions = [f"{fmt.plain(arm.arm)}: {fmt.plain(arm.decision)}" for arm in phase.arms if arm.decision]
    return Rounds(saving, f"{note}: confirm a winner on fresh seeds.", decisions)


def campaign_counts(counts: TrialCounts) -> str:
    """Formats the trials of a campaign, which counts shared trials once: `29 trials + 3 reused`."""
    return trial_counts(replace(counts, reused=0)) + (f" + {counts.reused} reused" if counts.reused else "")


def claim_counts(verdicts: Iterable[str]) -> str:
    """Formats the number of claims per verdict: `2 reproduced, 1 refuted and 1 undecided`."""
    counts = Counter(verdicts)
    return fmt.listing(f"{counts[verdict]} {verdict}" for verdict in CLAIM_VERDICTS if counts[verdict])


def seeds_needed(arm: ArmSummary) -> str:
    """Returns how many seeds would decide an undecided arm; empty for others, and if seeds were added until decided."""
    if arm.seeds_to_decide:
        return f"about {arm.seeds_to_decide} seeds"
    is_open = arm.verdict == "undecided" and arm.delta and not arm.decision
    return f"over {MAX_SEEDS:,} seeds" if is_open else ""


def verdict(arm: ArmSummary) -> str:
    """Returns the verdict on an arm, with the seeds that would decide it if it has none: `undecided, about 9 seeds`."""
    return ", ".join(filter(None, (arm.verdict, seeds_needed(arm))))


def is_named(arm: ArmSummary) -> bool:
    """Whether the name of an arm contains all of its settings."""
    name = fmt.plain(arm.arm)
    texts = [f"{setting.rpartition('.')[2]}={fmt.value(value)}" for setting, value in arm.overrides.items()]
    return bool(texts) and all(re.search(rf"(^|[ .]){re.escape(text)}($|,| [+])", name) for text in texts)


def varied(phase: PhaseSummary) -> dict[str, str]:
    """Maps each setting that varies in a phase to its values, or to their range if there are many."""
    if phase.swept:
        return {name: ", ".join(map(fmt.value, values)) for name, values in phase.swept.items()}
    texts = {}
    for name in sweep_axes(phase):
        values = [arm.overrides[name] for arm in phase.arms if arm.overrides]
        numeric = all(map(is_number, values))
        distinct = list(dict.fromkeys(map(fmt.value, sorted(values) if numeric else values)))
        if len(distinct) > 6 and numeric:
            texts[name] = f"{fmt.value(min(values))} to {fmt.value(max(values))}, {len(distinct)} values"
        else:
            texts[name] = fmt.listing(distinct, most=8)
    return texts


class ImportanceTable(NamedTuple):
    """Rows of (setting, share as text, percent), and a note that explains them."""

    rows: list[tuple[str, str, int]]
    note: str


def importance_table(phase: PhaseSummary) -> ImportanceTable | None:
    """Returns the importance of each swept setting; None if it cannot be computed."""
    if (importance := axis_importance(phase)) is None:
        return None
    rest = {} if importance.rest is None else {"interactions and chance": importance.rest}
    shares = importance.shares | rest
    note = f"Share of the variance of {phase.metric.name} over {importance.arms} arms that each setting explains: "
    rows = [(name, f"{share:.0%}", round(100 * share)) for name, share in shares.items()]
    return ImportanceTable(rows, f"{note}{importance.method}.")


def direction(goal: str | None) -> str:
    """Says whether lower or higher values of a metric are better; `goal` is None if nobody has said so."""
    if goal is None:
        return "whether lower or higher is better is not known here, since its plug-in is not loaded"
    return "higher is better" if goal == "maximize" else "lower is better"


def differences_note(phase: PhaseSummary, metric: str, goal: str | None, found: Mapping[str, Any] | None) -> str:
    """Explains the figure of the differences during training; `found` is the result of `differences`."""
    name = fmt.plain(metric)
    if found is None:
        return f"No two arms have {name} for two of their seeds each, so there are no differences."
    note = f"Mean difference of {name} at each evaluation over training tokens, paired by seed; {direction(goal)}. "
    note += f"The shade is its {interval_name(phase.confidence)}, from the same analysis as the table of the arms; "
    note += "each evaluation is judged alone."
    if metric != phase.metric.name:
        note += " No verdict uses this metric."
    if found["thinned"]:
        note += f" Thinned: {len(found['tokens'])} evaluations, equally spaced."
    return note


def trials_note(explored: Mapping[str, Any]) -> str:
    """Explains the table of trials, and says what the page leaves out; `explored` is the result of `explore`."""
    note = "Groups have the number of trials with the metric, its mean, sample standard deviation and standard error; "
    note += "a trial that two phases use counts once."
    most = max((len(grid["steps"]) for grid in explored["grids"]), default=0)
    if most and most == explored["points"]:
        note += f" Thinned: the curve of a trial has at most {most} steps, equally spaced; metrics.jsonl has all."
    shown, trials = len(explored["histograms"]), len({trial[3] for trial in explored["trials"]})
    if 0 < shown < trials:
        note += f" Histograms are here for {shown} of {trials} trials: the first seed of the best arms that have them."
    return note


def went_wrong(problem: TrialProblem) -> str:
    """Returns the reason why a trial did not finish, on one line, or how it ended."""
    return fmt.reason(problem.error or ENDINGS.get(problem.status, fmt.MISSING))


def trace_of(problem: TrialProblem) -> str | None:
    """Returns the traceback of a failed trial, also from an older journal; None if it raised no exception."""
    is_old = problem.error is not None and '  File "' in problem.error
    return problem.traceback or (problem.error if is_old else None)


def problem_groups(summary: CampaignSummary) -> list[list[TrialProblem]]:
    """Groups the trials that went wrong in the same way, largest group first."""
    groups: dict[tuple[str, str], list[TrialProblem]] = {}
    for problem in summary.problems:
        groups.setdefault((problem.status, went_wrong(problem)), []).append(problem)
    return sorted(groups.values(), key=len, reverse=True)


def fact(item: Any) -> str:
    """Formats a value of the environment or the data; integers get thousands separators."""
    if item is None:
        return fmt.MISSING
    return f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else fmt.value(item)


def moment(text: str) -> str:
    """Formats an ISO time as `2026-01-14 09:12 UTC`; returns other text unchanged."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def cost(summary: CampaignSummary) -> str:
    """Summarizes trials, tokens, wall time and concurrency on one line."""
    wall, in_trials = summary.seconds, summary.trial_seconds
    parts = [campaign_counts(summary.trials), f"{fmt.count(summary.tokens)} tokens", f"{fmt.duration(wall)} wall time"]
    if wall and in_trials:
        concurrency = f"{in_trials / wall:.1f} trials at a time"
        parts.append(concurrency if in_trials > wall else f"{fmt.duration(in_trials)} inside trials")
    return " · ".join(parts)


def cost_facts(summary: CampaignSummary) -> dict[str, str]:
    """Returns the costs of a campaign as name and text, without those that are unknown."""
    used = summary.cost
    formula = f"({fmt.duration(used.step_seconds)} inside training steps over wall time times slots)"
    facts = {
        "trials": campaign_counts(summary.trials),
        "training tokens": fmt.count(summary.tokens),
        "wall time": fmt.duration(summary.seconds),
        "time inside trials": fmt.duration(summary.trial_seconds),
        "device hours": "" if used.device_hours is None else f"{used.device_hours:.3g}",
        "trials at a time": f"at most {used.slots}" if used.slots else "",
        "packing": packing_fact(summary.packing) if summary.packing else "",
        "efficiency": "" if used.efficiency is None else f"{used.efficiency:.0%} {formula}",
    }
    return {name: text for name, text in facts.items() if text}


def packing_fact(packing: Mapping[str, Any]) -> str:
    """Describes how many trials shared a device, why, and the measured throughputs."""
    together = packing.get("together", 1)  # journals of older versions lack it
    trials = fmt.counted(packing["trials_per_device"], "trial" if together == 1 else "group")
    trials += "" if together == 1 else f" of {together} trials"
    text = f"{trials} at once on each device ({fmt.plain(packing['why'])})"
    curve = [f"{point['trials']}: {fmt.count(point['tokens_per_second'])}" for point in packing["curve"]]
    what = "trials" if together == 1 else "groups"
    return f"{text}; total tokens/s by {what} at once: {', '.join(curve)}" if curve else text


def troubles(summary: CampaignSummary) -> list[str]:
    """Lists retried trials, skipped shards and the number of warnings, one sentence each."""
    sentences = []
    for trial in summary.cost.retried:
        name = f"{fmt.plain(trial.phase)}/{fmt.plain(trial.arm)} seed {trial.seed}"
        sentences.append(f"{name} was started {trial.attempts} times; final status: {fmt.plain(trial.status)}.")
    if skipped := summary.data.get("skipped_shards"):
        shards = f"{skipped} corrupt shards were" if skipped > 1 else f"{skipped} corrupt shard was"
        sentences.append(f"{shards} skipped when the data were read.")
    warned = [f"{len(phase.warnings)} in {fmt.plain(phase.phase)}" for phase in summary.phases if phase.warnings]
    if warned:
        sentences.append(f"Warnings are listed with their phases: {fmt.listing(warned)}.")
    return [*sentences, *settings_advice(summary)]


def settings_advice(summary: CampaignSummary) -> list[str]:
    """Says which settings are likely to be a mistake, given the corpus; nothing about older results and smoke runs."""
    from ngpt.training.config import TrainConfig  # imported here, so that `status` needs no torch
    from tune.planning.advice import advice_on_arms

    sizes = {name: summary.data.get(name) for name in ("train_tokens", "eval_tokens")}
    if summary.smoke or not summary.base or None in sizes.values():
        return []
    try:
        base = build(TrainConfig, summary.base)
        arms = [
            (f"{phase.phase}/{arm.arm}", override(base, {**phase.base, **arm.overrides}))
            for phase in summary.phases
            for arm in phase.arms
        ]
    except ConfigError:  # settings of another version
        return []
    has_tokenizer = summary.data.get("tokenizer_sha256") is not None if "tokenizer_sha256" in summary.data else None
    facts = {**sizes, "has_tokenizer": has_tokenizer}
    found = advice_on_arms(arms or [("base", base)], lambda config: facts if config.data == base.data else {})
    return [fmt.sentence(text[:1].upper() + text[1:]) for text in found]


def selection(shrunken: float | None) -> str:
    """Formats the effect of a winner after allowing for its selection; empty if there is nothing to allow for."""
    return (
        ""
        if shrunken is None
        else f"about {fmt.digits(shrunken, 2, plus=True)}, as the best of several arms is partly lucky"
    )
