"""What a summary says about its parts, in words that the page and its Markdown share."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from tune import format as fmt
from tune.analysis.importance import importance, is_number, sweep_axes

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
    found = importance(phase)
    if found is None:
        return None
    rows = [(name, f"{share:.0%}", round(100 * share)) for name, share in found.shares.items()]
    if found.rest is not None:
        rows.append(("interactions and chance", f"{found.rest:.0%}", round(100 * found.rest)))
    metric = (phase.get("metric") or {}).get("name") or "val_loss"
    note = f"Share of the variance of {metric} over {found.arms} arms that each setting explains: {found.method}."
    return {"rows": rows, "note": note}
