"""How numbers and names are written for people: shared by the terminal and the reports, so both say the same.

A value that is not there is written as a dash. Minus signs are real minus signs; the terminal replaces what its
encoding lacks.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MISSING = "\u2013"  # en dash
MINUS = "\u2212"  # as wide as a plus, so signs line up

# Error handler of codecs for what an encoding lacks: `text.encode("ascii", PORTABLE)`. A lost sign would turn a number.
PORTABLE = "ngpt-portable"
ASCII = dict(zip(f"{MINUS}{MISSING}±·…●─│━╸╺←→", "--~|~o-|==-<>", strict=True))


def _portable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error(PORTABLE, _portable)

# Every verdict that an arm can have, in the words of the "how to read" section.
VERDICTS = {
    "baseline": "The setting every other arm of its phase is compared with, seed by seed.",
    "better": "Improves on the baseline: the corrected p is below one minus the confidence, and the effect is at least "
    "the smallest one that matters.",
    "worse": "Loses to the baseline, by the same two tests.",
    "tie": "Neither: the data cannot tell it from the baseline, or the difference is too small to matter.",
    "no claim": "One seed only: a number, but no spread to judge it by.",
    "incomplete": "Some of its seeds have not finished, or were stopped early, so it is not judged.",
    "diverged": "At least one seed ended in a loss that is not finite. That is a result, and it ranks last.",
    "failed": "At least one trial ended in an error, listed under what went wrong.",
}

# What can become of a claim.
CLAIM_VERDICTS = {
    "reproduced": "The records say the same, beyond the noise.",
    "refuted": "The records say the opposite, or that no such effect is large enough to matter, beyond the noise.",
    "undecided": "Neither: too few seeds, too much noise, too small an effect, or trials that did not finish.",
    "no data": "No trial so far can say anything about it.",
}

_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]?")
_BREAKS = re.compile(r"[^\S ]+")  # tabs and line ends of every kind, not the space itself
# C0 and C1 controls, and the marks that reorder or hide text (bidirectional overrides, zero width), lone surrogates.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def plain(text: object) -> str:
    """Untrusted text on one line, without terminal escapes, control characters or marks that reorder it."""
    return _CONTROLS.sub("", _BREAKS.sub(" ", _ESCAPES.sub("", str(text)))).strip()


def sentence(text: object) -> str:
    """Untrusted text with a full stop, unless it ends like a sentence already."""
    words = plain(text or "")
    return words if not words or words[-1] in ".!?" else f"{words}."


def shorten(text: str, width: int) -> str:
    """Cuts the middle out of a long name: names of arms differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def number(value: float | None, decimals: int = 4) -> str:
    """A loss: four decimals, as many as seeds ever agree on."""
    if value is None:
        return MISSING
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def signed(value: float | None) -> str:
    """A difference, with its sign always written."""
    text = number(value)
    return f"+{text}" if value is not None and float(f"{value:.4f}") > 0 else text


def p_value(value: float | None) -> str:
    """A probability; below one in a thousand only its smallness counts."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """Tokens or trials with three digits: 812, 12.3k, 4.19M, 1.20B."""
    if value is None:
        return MISSING
    size, unit = float(value), ""
    for unit in ("", "k", "M", "B", "T"):
        if abs(size) < 999.5 or unit == "T":
            break
        size /= 1000
    if not unit:
        return f"{size:.0f}"
    return (
        f"{size:.2f}{unit}" if abs(size) < 9.995 else f"{size:.1f}{unit}" if abs(size) < 99.95 else f"{size:.0f}{unit}"
    )


def size(amount: int) -> str:
    """Bytes: `740 kB`, `2.1 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount} B"


def duration(seconds: float | None, *, tenths: bool = True) -> str:
    """A time with its two leading units: 4.1 s, 1 m 23 s, 2 h 05 m, 3 d 4 h; without `tenths` 4 s."""
    if seconds is None:
        return MISSING
    if tenths and seconds < 59.95:
        return f"{max(seconds, 0):.1f} s"
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def value(item: Any) -> str:
    """One setting as the YAML writes it."""
    if item is None or isinstance(item, bool):
        return {None: "null", True: "true", False: "false"}[item]
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        return f"{{{settings(item, empty='')}}}"
    return plain(item)


def settings(overrides: Mapping[str, Any] | None, empty: str = MISSING) -> str:
    """Overrides as `name=value, name=value`."""
    return ", ".join(f"{plain(name)}={value(item)}" for name, item in (overrides or {}).items()) or empty


def half_width(spread: Mapping[str, Any] | None) -> float | None:
    """Half of an interval, the number that stands behind a plus-minus sign."""
    low, high = (spread or {}).get("ci_low"), (spread or {}).get("ci_high")
    return None if low is None or high is None else (high - low) / 2


def mean_interval(spread: Mapping[str, Any] | None) -> str:
    """`4.3211 ± 0.0123`: the mean over seeds and half of its confidence interval."""
    mean, half = (spread or {}).get("mean"), half_width(spread)
    return number(mean) if mean is None or half is None else f"{number(mean)} ± {number(half)}"


def effect(delta: Mapping[str, Any] | None) -> str:
    """`-0.0123 [-0.0150, -0.0096]`: a difference from the baseline with its confidence interval."""
    if not delta or delta.get("mean") is None:
        return MISSING
    low, high = delta.get("ci_low"), delta.get("ci_high")
    return signed(delta["mean"]) + ("" if low is None or high is None else f" [{signed(low)}, {signed(high)}]")


def claim_value(claim: Mapping[str, Any]) -> str:
    """What the records show for a claim, with its interval: `-0.0326 [-0.0379, -0.0282]`, `1.32e+08`."""

    def short(x: float) -> str:
        whole = low is None and x and round(x, 4) == round(x)  # 39 experiments, and not 39.0000
        plain = number(x, 0 if whole else 4)
        return (plain if x == 0 or 1e-3 <= abs(x) < 1e4 else f"{x:.3g}").replace("-", MINUS)

    value, low, high = claim.get("observed"), claim.get("ci_low"), claim.get("ci_high")
    if value is None:
        return MISSING
    return short(value) + ("" if low is None or high is None else f" [{short(low)}, {short(high)}]")


def claim_counts(claims: Sequence[Mapping[str, Any]]) -> str:
    """`2 reproduced, 1 refuted and 1 undecided`."""
    verdicts = [claim.get("verdict") for claim in claims]
    return listing(f"{verdicts.count(verdict)} {verdict}" for verdict in CLAIM_VERDICTS if verdict in verdicts)


def span(arms: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """The range that all intervals against the baseline cover, zero included."""
    deltas = [arm["delta"] for arm in arms if arm.get("delta")]
    ends = [delta[key] for delta in deltas for key in ("mean", "ci_low", "ci_high") if delta.get(key) is not None]
    return min([0.0, *ends]), max([0.0, *ends])


def forest(arms: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The intervals of all arms drawn as text on one scale: `──●──  │`, where the bar is the baseline."""
    low, high = span(arms)
    if width < 2 or low == high:
        return [" " * width] * len(arms)

    def place(x: float) -> int:
        return round((x - low) / (high - low) * (width - 1))

    rows = []
    for arm in arms:
        row, delta = [" "] * width, arm.get("delta") or {}
        if delta.get("ci_low") is not None and delta.get("ci_high") is not None:
            first, last = place(delta["ci_low"]), place(delta["ci_high"])
            row[first : last + 1] = "─" * (last + 1 - first)
        row[place(0)] = "│"
        if delta.get("mean") is not None or arm.get("verdict") == "baseline":
            row[place(delta.get("mean") or 0)] = "●"
        rows.append("".join(row))
    return rows


def counted(number: int, noun: str) -> str:
    """`1 trial`, `12 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listing(names: Iterable[str], most: int = 6) -> str:
    """`a, b and c`, cut to `most` names; `a=1, b=2; a=3, b=4 and c` where a name is a list itself."""
    items = list(names)
    gap = "; " if any("," in item for item in items) else ", "
    items = items[:most] + ([f"{len(items) - most} more"] if len(items) > most else [])
    return f"{gap.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def trial_counts(trials: Mapping[str, Any] | None) -> str:
    """`29 trials (27 finished, 2 diverged)`; all finished needs no list."""
    counts = trials or {}
    total = counts.get("total") or 0
    parts = [f"{counts[key]} {key}" for key in ("finished", "diverged", "failed", "stopped") if counts.get(key)]
    unusual = counts.get("finished") != total
    if counts.get("reused"):
        parts = (parts if unusual else []) + [f"{counts['reused']} reused"]
        unusual = True
    return counted(total, "trial") + (f" ({', '.join(parts)})" if parts and unusual else "")


def campaign_counts(trials: Mapping[str, Any] | None) -> str:
    """The same of a whole campaign, whose total has each trial once: `29 trials + 3 reused` for 32 in its phases."""
    counts = dict(trials or {})
    reused = counts.pop("reused", 0)
    return trial_counts(counts) + (f" + {reused} reused" if reused else "")


def cost(summary: Mapping[str, Any]) -> str:
    """What the answer cost: trials, tokens, wall time, and how many trials ran side by side."""
    wall, work = summary.get("seconds"), summary.get("trial_seconds")
    parts = [
        campaign_counts(summary.get("trials")),
        f"{count(summary.get('tokens'))} tokens",
        f"{duration(wall)} wall time",
    ]
    if wall and work:
        parts.append(f"{work / wall:.1f} trials at a time" if work > wall else f"{duration(work)} inside trials")
    return " · ".join(parts)


def noise(phase: Mapping[str, Any]) -> str:
    """What the seeds say about chance in this phase, and what effect it could have seen."""
    facts = phase.get("noise") or {}
    sd, correlation, least = facts.get("sd"), facts.get("correlation"), facts.get("smallest_detectable")
    if sd is None:
        return "Noise unknown: one seed gives no spread."
    method = plain(facts.get("method") or "")
    parts = [f"sd {number(sd)}" + (f" ({method})" if method else "")]
    if correlation is not None:
        parts.append(f"correlation between arms over seeds {number(correlation, 2)}")
    if least is not None:
        parts.append(f"smallest detectable effect {number(least)}")
    return f"Noise: {', '.join(parts)}."


def interval_name(phase: Mapping[str, Any]) -> str:
    """`95 % interval`, at the confidence of the phase."""
    confidence = phase.get("confidence")
    return "interval" if confidence is None else f"{100 * confidence:g} % interval"


def winning_arm(phase: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The arm that won the phase, with its numbers."""
    return next((arm for arm in phase.get("arms") or [] if arm["arm"] == phase.get("winner")), None)


def own_warnings(summary: Mapping[str, Any]) -> list[str]:
    """The warnings of a campaign that none of its phases shows already."""
    phases = summary.get("phases") or []
    shown = {f"{phase.get('phase')}: {warning}" for phase in phases for warning in phase.get("warnings") or []}
    return [warning for warning in summary.get("warnings") or [] if warning not in shown]


def tied(phase: Mapping[str, Any]) -> list[str]:
    """Arms that cannot be told from the winner of the phase."""
    arms = phase.get("arms") or []
    return [plain(arm["arm"]) for arm in arms if arm.get("tied_with_winner") and arm["arm"] != phase.get("winner")]


def answer_phase(summary: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The phase that the answer was read from."""
    name = (summary.get("answer") or {}).get("phase")
    return next((phase for phase in summary.get("phases") or [] if phase.get("phase") == name), None)
