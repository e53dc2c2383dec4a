"""Formats numbers and names for reports and the terminal.

Missing values become a dash. Minus signs are U+2212; the terminal replaces characters that its encoding lacks.
"""

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ngpt.config.visible import visible

MISSING = "\u2013"  # en dash
MAX_REASON = 400  # characters of the reason why a trial failed
MINUS = "\u2212"  # as wide as a plus, so signs line up

# Codec error handler that replaces unencodable characters by ASCII, so that no minus sign is lost.
# Usage: `text.encode("ascii", PORTABLE)`.
PORTABLE = "ngpt-portable"
ASCII = dict(zip(f"{MINUS}{MISSING}±·…●─│━╸╺←→", "--~|~o-|==-<>", strict=True))


def _replace_by_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error(PORTABLE, _replace_by_ascii)

_BREAKS = re.compile(r"[\t\n\v\f\r]+")


def plain(text: object) -> str:
    """Returns untrusted text in visible form on one line; line breaks and tabs between words become spaces."""
    return visible(_BREAKS.sub(" ", str(text)).strip())


def reason(error: str) -> str:
    """Returns the first paragraph of an error on one line: the type and message of an exception, without its advice.

    Journals of older versions hold a traceback instead, whose exception follows the last line of code.
    """
    lines = error.strip().splitlines()
    frames = [i for i, line in enumerate(lines) if line.startswith('  File "')]
    if frames:
        lines = [line for i, line in enumerate(lines) if i > frames[-1] and not line.startswith("    ")]
    elif lines and lines[0].startswith("Traceback"):
        del lines[0]
    paragraph, _, _ = "\n".join(lines).strip().partition("\n\n")
    return shorten(plain(paragraph), MAX_REASON)


def sentence(text: object) -> str:
    """Returns untrusted text as a sentence: adds a period unless it ends with one, or with `!` or `?`."""
    words = plain(text or "")
    return words if not words or words[-1] in ".!?" else f"{words}."


def shorten(text: str, width: int) -> str:
    """Shortens a name to `width` by cutting its middle, since arm names differ at their ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def number(value: float | None, decimals: int = 4) -> str:
    """Formats a loss, by default with four decimals: noise between seeds is larger than the fifth."""
    if value is None:
        return MISSING
    text = f"{value:.{decimals}f}"
    return text.replace("-", MINUS) if float(text) else text.lstrip("-")


def signed(value: float | None, decimals: int = 4) -> str:
    """Formats a difference with its sign."""
    text = number(value, decimals)
    return f"+{text}" if value is not None and float(f"{value:.{decimals}f}") > 0 else text


def digits(value: float, number: int = 4, *, plus: bool = False) -> str:
    """Formats a number with so many significant digits, and `plus` puts a sign before positive ones too."""
    return f"{value:{'+' if plus else ''}.{number}g}".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Formats a p-value: `<0.001`, `0.012`, `0.34`."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """Formats a count with three significant digits: `812`, `12.3k`, `4.19M`, `1.20B`."""
    if value is None:
        return MISSING
    unit = ""
    for unit in ("", "k", "M", "B", "T"):
        if abs(value) < 999.5 or unit == "T":
            break
        value /= 1000
    decimals = 0 if not unit or abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{decimals}f}{unit}"


def size(amount: int) -> str:
    """Formats a number of bytes: `740 kB`, `2.1 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if amount >= factor:
            return f"{amount / factor:.3g} {unit}"
    return f"{amount} B"


def duration(seconds: float | None, *, tenths: bool = True) -> str:
    """Formats a time by its two largest units: `4.1 s` (`4 s` without `tenths`), `1 m 23 s`, `2 h 05 m`, `3 d 4 h`."""
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
    """Formats the value of a setting in YAML notation."""
    if item is None or isinstance(item, bool):
        return {None: "null", True: "true", False: "false"}[item]
    if isinstance(item, float):
        return f"{item:.6g}"
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    if isinstance(item, Mapping):
        return f"{{{settings(item, empty='')}}}"
    return plain(item)


def settings(overrides: Mapping[str, Any], empty: str = MISSING) -> str:
    """Formats overrides as `name=value, name=value`."""
    return ", ".join(f"{plain(name)}={value(item)}" for name, item in overrides.items()) or empty


def claim_value(observed: float | None, low: float | None = None, high: float | None = None) -> str:
    """Formats an observed value with its interval: `-0.0326 [-0.0379, -0.0282]`; without one `1.32e+08` or `39`."""
    if observed is None:
        return MISSING
    is_whole = low is None and observed and round(observed, 4) == round(observed)
    decimals = 0 if is_whole else 4

    def short(x: float) -> str:
        return f"{x:.3g}".replace("-", MINUS) if x and not 1e-3 <= abs(x) < 1e4 else number(x, decimals)

    return short(observed) if low is None or high is None else f"{short(observed)} [{short(low)}, {short(high)}]"


def counted(number: int, noun: str) -> str:
    """Formats a number with its noun: `1 trial`, `12 trials`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listing(names: Iterable[str], most: int = 6) -> str:
    """Lists at most `most` names: `a, b and c`. If a name contains commas, semicolons separate the names."""
    items = list(names)
    separator = "; " if any("," in item for item in items) else ", "
    items = items[:most] + ([f"{len(items) - most} more"] if len(items) > most else [])
    return f"{separator.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
