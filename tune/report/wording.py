"""What a summary says about its parts, in words that the page and its Markdown share."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tune import format as fmt
from tune.analysis.importance import axis_importance, is_number, sweep_axes
from tune.analysis.verdicts import smallest_detectable_effect

# What to say of a trial that left no error behind.
ENDS = {
    "diverged": "its loss was no finite number any more",
    "stopped": "the campaign was stopped before its end",
}

CLAIMS_NOTE = (
    "A claim is judged at the confidence of the campaign, by paired differences over the seeds. Claims are not "
    "corrected against each other: at 95 %, up to one in forty of those that are wrong is reproduced by luck."
)


def is_named(arm: Mapping[str, Any]) -> bool:
    """Whether the name of an arm says all of its settings, so that a list of them would repeat it."""
    name, overrides = fmt.plain(arm["arm"]), arm.get("overrides") or {}
    texts = [f"{setting.rpartition('.')[2]}={fmt.value(value)}" for setting, value in overrides.items()]
    return bool(texts) and all(re.search(rf"(^|[ .]){re.escape(text)}($|,| [+])", name) for text in texts)


def varied(phase: Mapping[str, Any]) -> dict[str, str]:
    """What varies in a phase and over which values; for a search, the range that its arms cover."""
    swept = phase.get("swept") or {}
    if swept:
        return {name: ", ".join(map(fmt.value, values or ())) for name, values in swept.items()}
    found = {}
    for name in sweep_axes(phase):
        values = [arm["overrides"][name] for arm in phase.get("arms") or [] if arm.get("overrides")]
        numeric = all(map(is_number, values))
        distinct = list(dict.fromkeys(map(fmt.value, sorted(values) if numeric else values)))
        if len(distinct) > 6 and numeric:
            found[name] = f"{fmt.value(min(values))} to {fmt.value(max(values))}, {len(distinct)} values"
        else:
            found[name] = fmt.listing(distinct, most=8)
    return found


def went_wrong(problem: Mapping[str, Any]) -> str:
    """What a trial that did not finish well said last."""
    status = problem.get("status") or ""
    return fmt.plain(problem.get("error") or ENDS.get(status, fmt.MISSING))


def fact(item: Any) -> str:
    """A value of the environment or the data: whole numbers with separators."""
    if item is None:
        return fmt.MISSING
    return f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else fmt.value(item)


def moment(text: str) -> str:
    """`2026-01-14 09:12 UTC` for an ISO time; anything else as it is."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    return f"{when:%Y-%m-%d %H:%M} UTC"


def importance_rows(phase: Mapping[str, Any]) -> dict[str, Any] | None:
    """The table of axis importance, the same for the page and for Markdown."""
    found = axis_importance(phase)
    if found is None:
        return None
    rows = [(name, f"{share:.0%}", round(100 * share)) for name, share in found.shares.items()]
    if found.rest is not None:
        rows.append(("interactions and chance", f"{found.rest:.0%}", round(100 * found.rest)))
    metric = (phase.get("metric") or {}).get("name") or "val_loss"
    note = f"Share of the variance of {metric} over {found.arms} arms that each setting explains: {found.method}."
    return {"rows": rows, "note": note}


def cost_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The cost of a campaign in words, by name; what is not known is left out."""
    spent = summary.get("cost") or {}
    facts = {
        "trials": fmt.campaign_counts(summary.get("trials")),
        "training tokens": fmt.count(summary.get("tokens")),
        "wall time": fmt.duration(summary.get("seconds")),
        "time inside trials": fmt.duration(summary.get("trial_seconds")),
    }
    if spent.get("device_hours") is not None:
        facts["device hours"] = f"{spent['device_hours']:.3g}"
    if spent.get("slots"):
        facts["trials at a time"] = f"at most {spent['slots']}"
    if packing := summary.get("packing"):
        facts["packing"] = packing_fact(packing)
    if spent.get("efficiency") is not None:
        inside = fmt.duration(spent.get("step_seconds"))
        facts["efficiency"] = f"{spent['efficiency']:.0%} ({inside} inside training steps over wall time times slots)"
    return facts


def packing_fact(packing: Mapping[str, Any]) -> str:
    """How many trials shared a device, for people: the choice, why, and the curve it was chosen from."""
    n = packing["trials_per_device"]
    text = f"{n} trial{'' if n == 1 else 's'} at once on each device ({fmt.plain(packing['why'])})"
    curve = [f"{point['trials']}: {fmt.count(point['tokens_per_second'])}" for point in packing["curve"]]
    return f"{text}; tokens/s in all by trials at once: {', '.join(curve)}" if curve else text


def troubles(summary: Mapping[str, Any]) -> list[str]:
    """What went wrong besides trials that ended badly, one sentence each."""
    found = []
    for trial in (summary.get("cost") or {}).get("retried") or []:
        place = f"{fmt.plain(trial['phase'])}/{fmt.plain(trial['arm'])} seed {trial['seed']}"
        found.append(f"{place} was started {trial['attempts']} times; in the end: {fmt.plain(trial['status'])}.")
    skipped = (summary.get("data") or {}).get("skipped_shards")
    if skipped:
        found.append(f"{skipped} corrupt shard{'s were' if skipped > 1 else ' was'} skipped when the data were read.")
    phases = [phase for phase in summary.get("phases") or [] if phase.get("warnings")]
    if phases:
        counts = (f"{len(phase['warnings'])} in {fmt.plain(phase.get('phase'))}" for phase in phases)
        found.append(f"Warnings stand with their phases: {fmt.listing(counts)}.")
    return found


def next_step(summary: Mapping[str, Any]) -> str:
    """The most useful thing to do after reading this summary, in one sentence."""
    answer, phases = summary.get("answer") or {}, summary.get("phases") or []
    if summary.get("left_out"):
        return "Raise `budget:` and run the same command again: it continues where it stopped and repeats nothing."
    if summary.get("status") != "finished":
        return "Run the same command again: it continues where it stopped and repeats nothing."
    if (summary.get("trials") or {}).get("failed"):
        return "See in the report what failed. The same command tries those trials again and repeats nothing else."
    if answer.get("winner") and answer.get("delta"):
        if not answer.get("confirmed"):
            return "Confirm it on seeds nobody has looked at: add a phase with `arm: winner` and `seeds: fresh 5`."
    elif phases:
        more = _more_seeds(fmt.answer_phase(summary) or phases[-1])
        if more:
            return more
    return "Your own question is one line away: change `vary:` and run again; what has finished is reused."


def _more_seeds(phase: Mapping[str, Any]) -> str | None:
    """What would have let an undecided phase see more; None if it has seen every effect that matters."""
    seeds, arms, matters = phase.get("seeds") or [], phase.get("arms") or [], phase.get("min_effect")
    noise = phase.get("noise") or {}
    if len(seeds) == 1:
        return "One seed carries no claim. Set `seeds: [1, 2, 3]` and run again: what has finished is reused."
    if not matters or not noise.get("smallest_detectable"):
        return None
    needed, rules = len(seeds), {"method": noise["method"], "confidence": phase["confidence"]}
    while (smallest_detectable_effect(needed, len(arms), noise["sd"], **rules) or 0.0) > matters:
        needed += 1 + needed // 20
    if needed == len(seeds):
        return None
    return f"To see an effect of {matters:g} as well, about {needed} seeds are needed; finished ones are reused."
