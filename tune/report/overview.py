"""The page that compares the campaigns of a results folder: one row for each, also for one that cannot be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from tune.report.html import Live, page_environment, page_text, script_digest
from tune.storage.summaries import Delta

CHART_WIDTH = 120  # of the interval in a row, in pixels
PAD = 6  # so that a dot at the edge is drawn whole


@dataclass(frozen=True)
class CampaignRow:
    """What the page says about a campaign; one that cannot be read has a `reason` only."""

    name: str  # of its folder
    href: str | None = None
    state: str = "broken"  # running | finished | stopped | broken | not read yet
    detail: str = ""  # where it stands, or why it does not go on
    progress: str = ""  # `12 of 32 trials`
    remaining: str = ""  # `about 2 m left`
    reason: str = ""  # why it cannot be read
    arm: str | None = None  # the leading arm
    note: str = ""  # how sure the lead is
    metric: str = ""
    delta: Delta | None = None
    done: int = 0  # trials that have ended
    total: int = 0  # trials that are planned or expected
    problems: str = ""  # `1 failed`
    tokens: int | None = None
    seconds: float | None = None
    newest: str = ""  # time of the newest event, ISO


class Interval(NamedTuple):
    """A difference and its interval as positions in a chart, in pixels."""

    zero: float
    low: float
    mean: float
    high: float


def render_overview(rows: Sequence[CampaignRow], *, folder: str, left_out: int, problem: str, live: Live) -> str:
    """Renders the page; `left_out` campaigns have no row, `problem` says why the folder cannot be read."""
    facts = {"rows": rows, "intervals": intervals(rows), "width": CHART_WIDTH}
    return _render("overview.html.j2", folder=folder, left_out=left_out, problem=problem, live=live, **facts)


def render_notice(heading: str, text: str, live: Live) -> str:
    """Renders the page of a campaign that has no report."""
    return _render("notice.html.j2", heading=heading, text=text, live=live)


def _render(template: str, **values: Any) -> str:
    """Renders a page with the scripts and requests of its own server, and with one style."""
    environment = page_environment()
    style = environment.get_template("overview.css.j2").render()
    theme_js = page_text("theme.js")
    allowed = f"script-src 'self' 'sha256-{script_digest(theme_js)}'; connect-src 'self'"
    allowed += f"; style-src 'sha256-{script_digest(style)}'"
    policy = Markup(f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'")
    values |= {"style": Markup(style), "theme_js": Markup(theme_js), "policy": policy}
    return environment.get_template(template).render(values)


def intervals(rows: Sequence[CampaignRow]) -> list[Interval | None]:
    """The chart of each row. Rows with the same metric share a scale, so that their effects can be compared."""
    reach: dict[str, list[float]] = {}
    for row in rows:
        if row.delta is not None:
            reach.setdefault(row.metric, [0.0]).extend(_ends(row.delta))
    return [_interval(row.delta, reach[row.metric]) if row.delta else None for row in rows]


def _ends(delta: Delta) -> tuple[float, float, float]:
    low, high = delta.ci_low, delta.ci_high
    return (delta.mean if low is None else low, delta.mean, delta.mean if high is None else high)


def _interval(delta: Delta, reach: Sequence[float]) -> Interval:
    first, last = min(reach), max(reach)
    scale = (CHART_WIDTH - 2 * PAD) / ((last - first) or 1.0)
    low, mean, high = (round(PAD + (value - first) * scale, 1) for value in _ends(delta))
    return Interval(round(PAD - first * scale, 1), low, mean, high)
