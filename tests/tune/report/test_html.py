"""The report: hand-made summaries in, parsed pages and tables out.

Summaries are written as JSON, as an older version may have left them, and read by `from_json`.
"""

import base64
import copy
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import pytest

from tests.helpers.summaries import from_json
from tune import format as fmt
from tune.report import figures, html, markdown
from tune.report.explorer import Details
from tune.report.figures import MAX_POINTS
from tune.report.markdown import cell
from tune.report.trial_logs import curves_by_arm
from tune.report.wording import moment
from tune.storage.summaries import CampaignSummary, PhaseSummary, TrialRecord

Summary = dict[str, Any]
DELTA = "-0.0349 [-0.0379, -0.0319]".replace("-", fmt.MINUS)
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "a|b",
    "[red]x[/]",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "</script><script>alert(1)</script>",
    "`x`\n# y",
    "{{ 7 * 7 }}",
    "\u202eevil",
    "var(--better)",
)


def render_html(summary: Summary, curves: list[Summary], records: Sequence[TrialRecord] = ()) -> str:
    return html.render_html(from_json(CampaignSummary, summary), curves, Details(records))


def render_markdown(summary: Summary) -> str:
    return markdown.render_markdown(from_json(CampaignSummary, summary))


def effect_figure(own: Summary) -> figures.Figure | None:
    return figures.effect_figure(from_json(PhaseSummary, own))


def curve_figure(own: Summary, rows: Any, metric: str = "val_loss") -> figures.Figure | None:
    return figures.curve_figures(from_json(PhaseSummary, own), rows, [metric]).get(metric)


def arm(name: str, mean: float | None, verdict: str, delta: float | None = None, **more: Any) -> Summary:
    spread = {"mean": mean, "sd": 0.004, "ci_low": mean and mean - 0.01, "ci_high": mean and mean + 0.01}
    effect = {"mean": delta, "ci_low": delta and delta - 0.003, "ci_high": delta and delta + 0.003, "p": 0.002}
    numbers = {"val_bpb": mean and mean / 3, "train_loss": mean, "tokens_per_second": 41234.0, "tokens": 4_194_304}
    facts = {"rank": 1, "overrides": {}, "n": 3, "tied_with_winner": False, "seconds": 9.0, "trial_ids": ["t"]}
    judged = {"score": spread, "delta": effect | {"p_holm": 0.004} if delta else None, "verdict": verdict}
    return {"arm": name} | facts | judged | numbers | more


def phase(name: str = "alpha", **more: Any) -> Summary:
    arms = [
        arm("alpha=0.15", 4.3771, "better", -0.0349, overrides={"model.alpha": 0.15}),
        arm("alpha=0.28", 4.3794, "better", -0.0326, overrides={"model.alpha": 0.28}, tied_with_winner=True, rank=2),
        arm("baseline", 4.412, "baseline", rank=3),
        arm("alpha=0.05", 4.4332, "worse", 0.0212, overrides={"model.alpha": 0.05}, rank=4),
        arm("alpha=0.6", None, "diverged", overrides={"model.alpha": 0.6}, n=1, rank=5),
    ]
    return {
        "campaign": "c",
        "phase": name,
        "metric": {"name": "val_loss", "goal": "minimize"},
        "confidence": 0.95,
        "min_effect": 0.005,
        "seeds": [1, 2, 3],
        "inherit": None,
        "base": {"optim.lr": 0.0003},
        "swept": {"model.alpha": [0.05, 0.15, 0.28, 0.6]},
        "arms": arms,
        "baseline": "baseline",
        "winner": "alpha=0.15",
        "why": "alpha=0.15 lowers val_loss by 0.0349",
        "noise": {"sd": 0.0041, "method": "paired", "correlation": 0.87, "df": 8, "smallest_detectable": 0.0063},
        "warnings": ["the winner is close to the edge"],
        "trials": {"total": 15, "finished": 14, "diverged": 1, "failed": 0, "stopped": 0, "reused": 0},
        "tokens": 62_914_560,
        "seconds": 412.5,
    } | more


def campaign(*phases: Summary) -> Summary:
    chosen = list(phases or [phase()])
    delta = {"mean": -0.0349, "ci_low": -0.0379, "ci_high": -0.0319, "p": 0.002}
    winner = {"winner": "alpha=0.15", "overrides": {"model.alpha": 0.15}, "delta": delta, "confirmed": False}
    error = "train_loss is not finite at step 41"
    return {
        "campaign": "ngpt-gh200",
        "description": "Which alpha?",
        "status": "finished",
        "metric": {"name": "val_loss", "goal": "minimize"},
        "answer": {"sentence": "Use alpha=0.15.", "phase": chosen[0]["phase"]} | winner,
        "trials": {"total": 15, "finished": 14, "diverged": 1, "failed": 0, "stopped": 0, "reused": 2},
        "tokens": 62_914_560,
        "seconds": 83.0,
        "trial_seconds": 240.7,
        "started_at": "2026-01-14T09:12:44+00:00",
        "environment": {"device": "GH200", "torch": "2.11.0"},
        "data": {"corpus": "python-docs", "vocab_size": 8192},
        "command": "python run_campaign.py x.yaml",
        "phases": chosen,
        "problems": [
            {"phase": "alpha", "arm": "alpha=0.6", "seed": 2, "trial_id": "t9", "status": "diverged", "error": error}
        ],
        "warnings": [f"{p['phase']}: {w}" for p in chosen for w in p["warnings"]] + ["two torch versions"],
    }


def curves(summary: Summary, steps: int = 50) -> list[Summary]:
    rows = []
    for p in summary["phases"]:
        for a in p["arms"]:
            for seed in p["seeds"]:
                trial = {"phase": p["phase"], "arm": a["arm"], "trial_id": f"{a['arm']}-{seed}", "seed": seed}
                for step in range(steps):
                    place = trial | {"step": step, "tokens": step * 1000}
                    rows.append(place | {"train_loss": 9 - 4 * step / steps + seed / 100, "val_loss": None})
                    if step % 10 == 0:
                        rows.append(place | {"train_loss": None, "val_loss": 9.1 - 4 * step / steps + seed / 100})
    return rows


class Page(HTMLParser):
    """What a test asks about a page: its elements, its words, its tables, its figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.script_ids: list[str | None] = []
        self.rows: list[list[str]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")
            self.script_ids.append(dict(attrs).get("id"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)
            if self.rows and self.rows[-1]:
                self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def script(self, name: str) -> str:
        return self.scripts[self.script_ids.index(name)]

    def json(self, name: str) -> Any:
        return json.loads(self.script(name))

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]


def hostile_campaign(name: str) -> Summary:
    summary = campaign(phase(name, inherit=name, why=name, warnings=[name], winner=name, base={name: name}))
    own = summary["phases"][0]
    own["arms"][0] |= {"arm": name, "overrides": {name: name}}
    own["swept"] = {name: [name]}
    own["metric"] = {"name": name, "goal": "minimize"}
    summary |= {"campaign": name, "description": name, "command": name, "warnings": [name], "status": name}
    summary |= {"environment": {name: name}, "data": {name: name}, "started_at": name}
    summary["answer"] |= {"sentence": name, "winner": name, "overrides": {name: name}, "phase": name}
    summary["problems"] = [dict.fromkeys(("phase", "arm", "seed", "trial_id", "status", "error"), name)]
    return summary


def nulled(item: Any, keep: tuple[str, ...]) -> Any:
    """A summary in which every number, and so every difference, is missing."""
    if isinstance(item, dict):
        kept = {key: value for key, value in item.items() if key != "delta"}
        return {key: value if key in keep else nulled(value, keep) for key, value in kept.items()}
    if isinstance(item, list):
        return [nulled(part, keep) for part in item]
    return None if isinstance(item, float) else item


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block] for block in blocks]


def test_page_asks_nothing_of_the_network() -> None:
    summary = campaign()
    text = render_html(summary, curves(summary))
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    contract = r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(https?:)?//[^"'> ]+"""
    assert not re.findall(contract, text) and not page.tags("link")


def test_policy_forbids_the_network_and_names_the_scripts_by_hash() -> None:
    summary = campaign()
    page = Page(render_html(summary, curves(summary)))
    (policy,) = [meta["content"] for meta in page.tags("meta") if "http-equiv" in meta]
    rules = dict(rule.strip().split(" ", 1) for rule in (policy or "").split(";"))
    assert rules["default-src"] == "'none'"
    plotly = gzip.decompress(base64.b64decode(page.script("plotly")))  # the page unpacks and runs it
    sources = [
        *(script.encode() for script, name in zip(page.scripts, page.script_ids, strict=True) if not name),
        plotly,
    ]
    digests = [base64.b64encode(hashlib.sha256(source).digest()).decode() for source in sources]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert "unsafe" not in rules["script-src"]
    assert "connect-src" not in rules


def test_plotly_is_inlined_once_and_only_when_there_is_a_plot() -> None:
    summary = campaign(phase(), phase("second"))
    page = Page(render_html(summary, curves(summary)))
    assert page.script_ids.count("plotly") == 1 and page.scripts[-1].count("plotly.js v") == 0
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(page.script("plotly")))
    assert len(render_html(campaign(phase(arms=[])), [])) < 80_000


def test_answer_comes_before_cost_before_phases_before_problems_before_provenance() -> None:
    for text in (Page(render_html(campaign(), [])).text, render_markdown(campaign())):
        order = ["Use alpha=0.15.", "15 trials", "What went wrong", "Where the numbers come from", "How to read"]
        places = [text.index(words) for words in order]
        assert places == sorted(places)
        assert places[1] < text.index("alpha=0.15 lowers val_loss by 0.0349.") < places[2]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_inert_in_the_page(name: str) -> None:
    harmless, hostile = campaign(phase("x", inherit="x")), hostile_campaign(name)
    text = render_html(hostile, curves(hostile))
    page, expected = Page(text), Page(render_html(harmless, curves(harmless)))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in expected.elements} | {"a"}
    assert len(page.tags("script")) == len(expected.tags("script"))
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert fmt.plain(name) in " ".join(page.words)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_inert_in_the_plots(name: str) -> None:
    summary = hostile_campaign(name)
    figures = Page(render_html(summary, curves(summary))).json("figures")
    assert len(figures) == 4

    def labels(item: Any) -> list[str]:
        if isinstance(item, dict):
            return [text for key, part in item.items() if key != "hovertemplate" for text in labels(part)]
        return [text for part in item for text in labels(part)] if isinstance(item, list) else [str(item)]

    for text in labels(figures):
        assert "<" not in text.replace("<br>", "")
        assert "\x1b" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_stays_in_its_cell_of_the_markdown(name: str) -> None:
    summary, harmless = hostile_campaign(name), campaign(phase("x"))
    shape = [[len(row) for row in table] for table in markdown_tables(render_markdown(harmless))]
    text = render_markdown(summary)
    problems, sources = [[len(row) for row in table] for table in markdown_tables(text)][1:]
    assert [len(row) for row in markdown_tables(text)[0]] == shape[0]
    assert set(problems) == {6} and set(sources) == {2}
    assert "<" not in text
    assert "\x1b" not in text


def test_markdown_cell_escapes_what_markdown_would_read() -> None:
    assert cell("a|b") == "a\\|b"
    assert cell("<b>&") == "&lt;b&gt;&amp;"
    assert cell("[x](y) `z` *w*") == "\\[x\\](y) \\`z\\` \\*w\\*"
    assert cell("project_every _em_") == "project_every \\_em\\_"
    assert cell("two\nlines") == "two lines"
    assert cell(None) == fmt.MISSING


def test_markdown_table_has_a_row_for_each_arm() -> None:
    first, second = phase(), phase("second", arms=phase()["arms"][:2])
    tables = markdown_tables(render_markdown(campaign(first, second)))
    assert [len(table) - 2 for table in tables[:2]] == [5, 2]


def test_every_number_of_an_arm_is_in_both_tables() -> None:
    summary = campaign()
    page = Page(render_html(summary, []))
    rows = {row[1].split("model")[0]: [text.strip() for text in row] for row in page.rows if len(row) == 9}
    expected = ["4.3771 ± 0.0100", DELTA, "0.004", "better", "41.2k", "1.4590"]
    assert rows["alpha=0.15"][3:] == expected
    markdown = markdown_tables(render_markdown(summary))[0][2]
    assert [item.strip().replace("\\", "") for item in markdown[4:]] == expected


def test_winner_and_ties_are_named_with_the_effect() -> None:
    text = Page(render_html(campaign(), [])).text
    assert "Not distinguishable from it alpha=0.28" in text
    assert DELTA in text
    assert "not confirmed yet" in text


def test_the_tables_say_how_many_seeds_an_undecided_arm_needs() -> None:
    summary = campaign(phase(arms=[arm("a", 4.4, "undecided", 0.01, seeds_to_decide=9), arm("b", 4.4, "baseline")]))
    verdicts = [row[6].strip() for row in Page(render_html(summary, [])).rows if len(row) == 9]
    assert verdicts == ["verdict", "undecided about 9 seeds", "baseline"]
    assert "| undecided, about 9 seeds |" in render_markdown(summary)


def test_what_there_is_none_of_is_not_listed() -> None:
    text = Page(render_html(campaign() | {"data": {"corpus": "python-docs", "shards": {}}}, [])).text
    assert "python-docs" in text and "shards" not in text


def test_warning_of_a_phase_is_shown_once() -> None:
    text = Page(render_html(campaign(), [])).text
    assert text.count("close to the edge") == 1
    assert text.count("two torch versions") == 1


def test_verdict_is_a_word_with_a_colour() -> None:
    page = Page(render_html(campaign(), []))
    chips = [str(span.get("class")) for span in page.tags("span") if str(span.get("class")).startswith("chip")]
    assert {"chip better", "chip worse", "chip diverged", "chip no-claim"} <= set(chips)


def test_missing_numbers_are_dashes_everywhere() -> None:
    summary = nulled(campaign(), keep=("seeds", "swept", "base", "overrides"))
    summary |= {"tokens": None, "environment": None, "data": None, "description": None, "command": None}
    text = render_html(summary, [row | {"train_loss": None, "val_loss": None} for row in curves(campaign())])
    assert not re.search(r"\b(None|nan|Undefined)\b", Page(text).text)
    assert "None" not in render_markdown(summary)


@pytest.mark.parametrize("changed", [{"arms": []}, {"noise": None, "seeds": [1], "winner": None}, {"trials": None}])
def test_half_empty_phases_are_reported(changed: Summary) -> None:
    summary = campaign(phase(**changed))
    assert "alpha" in Page(render_html(summary, [])).text
    assert "## alpha" in render_markdown(summary)


def test_campaign_without_phases_has_no_answer_yet() -> None:
    summary = {"campaign": "x", "status": "interrupted"}
    assert "There is no answer yet." in Page(render_html(summary, [])).text
    assert "Run the same command again" in render_markdown(summary)


def test_one_seed_draws_dots_without_intervals() -> None:
    single = arm("a", 4.3, "no claim", n=1)
    single["delta"] = {"mean": -0.1, "ci_low": None, "ci_high": None, "p": None, "p_holm": None}
    figure = effect_figure(phase(arms=[single, arm("baseline", 4.4, "baseline", n=1)]))
    assert figure is not None
    (trace,) = [trace for trace in figure["data"] if trace["name"] == "no claim"]
    assert trace["x"] == [-0.1]
    assert trace["error_x"]["array"] == [0]


def test_effect_plot_has_the_band_that_does_not_matter_and_names_who_has_no_place() -> None:
    figure = effect_figure(phase())
    assert figure is not None
    assert [(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]] == [(-0.005, 0.005)]
    (words,) = [trace for trace in figure["data"] if trace["mode"] == "text"]
    assert words["text"] == ["  diverged"]
    better = next(trace for trace in figure["data"] if trace["name"] == "better")
    assert better["x"] == [-0.0349, -0.0326]
    assert better["error_x"]["array"] == pytest.approx([0.003, 0.003])


def test_curves_are_means_over_seeds_between_the_lowest_and_the_highest() -> None:
    summary = campaign()
    figure = curve_figure(summary["phases"][0], curves_by_arm(curves(summary)))
    assert figure is not None
    own = [trace for trace in figure["data"] if trace["name"] == "alpha=0.15"]
    band, train, val = own
    assert val["y"][0] == pytest.approx(9.12)
    assert (max(band["y"]), min(band["y"][:1])) == (9.13, 9.13)
    assert band["y"][-1] == pytest.approx(9.11)
    assert train["x"][:2] == [0, 1000]
    assert figure["layout"]["meta"]["over"] == "training tokens"


def test_curves_are_thinned_and_keep_their_ends() -> None:
    summary = campaign()
    figure = curve_figure(summary["phases"][0], curves_by_arm(curves(summary, steps=1001)))
    assert figure is not None
    lines = [trace for trace in figure["data"] if not trace.get("fill")]
    assert max(len(trace["x"]) for trace in lines) == MAX_POINTS
    assert {trace["x"][-1] for trace in lines} == {1_000_000}


def test_step_that_a_resumed_trial_logs_again_counts_once() -> None:
    row = {"phase": "alpha", "arm": "baseline", "trial_id": "t", "seed": 1, "step": 0, "tokens": None}
    rows = [row | {"train_loss": 5.0, "val_loss": None}, row | {"train_loss": 7.0}, row | {"step": None}]
    figure = curve_figure(phase(), curves_by_arm(rows))
    assert figure is not None
    assert [trace["y"] for trace in figure["data"]] == [[7.0]]
    assert figure["layout"]["meta"]["over"] == "steps"


def test_figures_are_what_plotly_knows() -> None:
    own = phase()
    summary = campaign(own)
    for figure in (effect_figure(own), curve_figure(own, curves_by_arm(curves(summary)))):
        go.Figure(copy.deepcopy(figure))  # raises on an unknown property or value


def test_big_campaign_stays_small_and_draws_few_curves_in_colour() -> None:
    arms = [arm("baseline", 4.4, "baseline")] + [arm(f"a={n}", 4.5, "worse", 0.1, rank=n) for n in range(333)]
    summary = campaign(phase(arms=arms))
    text = render_html(summary, curves(summary, steps=60))
    assert len(text) < 4_000_000
    effect, lines, *_ = Page(text).json("figures")
    assert len(effect["layout"]["yaxis"]["ticktext"]) == 40
    assert sum(trace["showlegend"] for trace in lines["data"]) == 8


def second_phase() -> Summary:
    """A grid of two settings on top of the winner of `alpha`."""
    arms = [
        arm(f"a={a}, b={b}", 4.2 + 0.1 * a + 0.01 * b, "worse", 0.1, overrides={"x.a": a, "x.b": b}, rank=3 * a + b)
        for a in (0, 1)
        for b in (0, 1, 2)
    ]
    base = {"model.alpha": 0.15}
    return phase("grid", arms=arms, inherit="alpha", base=base, winner="a=0, b=0", baseline="a=0, b=0", warnings=[])


def test_a_grid_has_its_settings_their_importance_and_the_inheritance_in_both_reports() -> None:
    summary = campaign(phase(), second_phase())
    text = render_html(summary, curves(summary))
    page, shown = Page(text), render_markdown(summary).replace("\\", "")
    assert "functional ANOVA of the complete grid" in page.text and "functional ANOVA of the complete grid" in shown
    assert re.search(r"x\.a 97% x\.b 3%", page.text) and "x.a 97%, x.b 3%" in shown
    assert "grid starts from alpha: alpha=0.15" in shown
    assert f"alpha=0.15 is better, {fmt.MINUS}0.0349" in page.text  # what the box of the phase says
    kinds = [figure["layout"]["meta"]["kind"] for figure in page.json("figures")]
    assert kinds == ["effect", "curves", "speed", "curves", "effect", "curves", "speed", "parallel", "curves"]
    places = [attributes["data-figure"] for attributes in page.tags("div") if "data-figure" in attributes]
    assert sorted(map(int, filter(None, places))) == [0, 1, 2, 4, 5, 6, 7]  # 3 and 8 are of another metric


def test_the_words_below_a_plot_say_what_is_in_it() -> None:
    many = [arm(f"alpha={i}", 4.3 + i / 100, "undecided", 0.01 + i / 100, rank=i) for i in range(1, 50)]
    lone = [arm("alpha=0", 4.4, "baseline"), arm("alpha=1", 4.3, "no claim", -0.1, n=1)]
    lone[1]["delta"] |= {"ci_low": None, "ci_high": None, "p": None, "p_holm": None}
    phases = (phase(), phase(arms=many), phase(arms=lone))
    usual, crowded, single = (render_html(campaign(own), curves(campaign(own))) for own in phases)
    bars, ranks = "Bars are 95 % intervals of the difference", "Numbers are ranks in the table"
    assert bars in usual and ranks in usual
    assert bars not in crowded and ranks not in crowded
    assert bars not in single and ranks in single
    assert "each line is the 95 % interval" in usual and "each line is" not in single


def test_cost_and_troubles_are_in_both_reports() -> None:
    summary = campaign()
    retried = {"phase": "alpha", "arm": "a<b", "seed": 2, "trial_id": "t", "attempts": 3, "status": "finished"}
    cost = {"slots": 4, "device_hours": 0.0461, "step_seconds": 166.0, "efficiency": 0.5, "retried": [retried]}
    summary |= {"cost": cost}
    summary["data"] |= {"skipped_shards": 2}
    for text in (Page(render_html(summary, [])).text, render_markdown(summary).replace("&lt;", "<")):
        for words in ("50% (2 m 46 s inside", "0.0461", "at most 4", "alpha/a<b seed 2 was started 3 times"):
            assert words in text
        assert "2 corrupt shards were skipped" in text and "1 in alpha" in text


def test_the_hover_of_a_mean_tells_the_range_of_its_seeds() -> None:
    summary = campaign()
    figure = curve_figure(summary["phases"][0], curves_by_arm(curves(summary)))
    assert figure is not None
    val = [trace for trace in figure["data"] if trace["name"] == "alpha=0.15"][2]
    assert val["customdata"][0] == [9.11, 9.13] and "mean of 3 seeds" in val["hovertemplate"]


def test_only_the_baseline_and_the_best_arms_have_a_band() -> None:
    arms = [arm(f"a={n}", 4.4 + n / 10, "worse", 0.1) for n in range(6)] + [arm("baseline", 5.4, "baseline")]
    summary = campaign(phase(arms=arms, winner="baseline"))
    figure = curve_figure(summary["phases"][0], curves_by_arm(curves(summary)))
    assert figure is not None
    assert sorted(t["name"] for t in figure["data"] if t.get("fill")) == ["a=0", "a=1", "a=2", "baseline"]


def test_report_is_written_next_to_the_campaign(tmp_path: Path) -> None:
    summary = campaign()
    html.write_report(tmp_path, from_json(CampaignSummary, summary), curves(summary))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == render_markdown(summary)


def test_times_are_in_utc() -> None:
    assert moment("2026-01-14T10:12:44+01:00") == "2026-01-14 09:12 UTC"
    assert moment("yesterday") == "yesterday"


def test_equal_errors_are_grouped_and_their_traceback_is_folded() -> None:
    summary = campaign()
    alike = {
        "phase": "alpha",
        "status": "failed",
        "error": "OSError: no disk\n\nadvice",
        "traceback": "Traceback\n  x.py",
    }
    other = {"phase": "alpha", "arm": "a", "seed": 1, "trial_id": "t0", "status": "failed", "error": "KeyError: 1"}
    summary["problems"] = [other, *({**alike, "arm": "b", "seed": seed, "trial_id": f"t{seed}"} for seed in (1, 2, 3))]
    page = render_html(summary, [])
    assert page.count("OSError: no disk (3 trials)") == 1 and page.count("KeyError: 1") == 1
    assert page.count("<details><summary>traceback</summary>") == 1 and "advice" not in page
    text = render_markdown(summary)
    assert text.count("OSError: no disk") == 1 and text.count("| the same |") == 2


def trial_records(summary: Summary, **more: Any) -> list[TrialRecord]:
    facts = {"status": "finished", "metrics": {"val_loss": 4.4, "tokens_per_second": 1000.0}} | more
    return [
        TrialRecord("c", p["phase"], a["arm"], f"{a['arm']}-{seed}", seed, {}, {"model.alpha": 0.1}, **facts)
        for p in summary["phases"]
        for a in p["arms"]
        for seed in p["seeds"]
    ]


def test_the_page_can_be_used_without_seeing_or_a_mouse() -> None:
    summary = campaign(phase(), second_phase())
    summary["claims"] = [{"id": "x", "verdict": "reproduced"}]
    page = Page(render_html(summary, curves(summary), trial_records(summary)))
    heads = page.tags("th")
    assert heads and all(attributes.get("scope") in ("col", "row") for attributes in heads)
    assert len(page.tags("caption")) == len(page.tags("table"))
    plots = [attributes for attributes in page.tags("div") if attributes.get("class") == "plot"]
    assert plots and all(plot["role"] == "img" and plot["aria-label"] for plot in plots)
    assert all(attributes.get("aria-label") for attributes in page.tags("svg"))
    assert all(attributes.get("type") == "button" for attributes in page.tags("button"))
    assert not [
        tag
        for tag, attributes in page.elements
        if {"onclick", "tabindex"} & attributes.keys() and tag == "div" and attributes.get("role") != "region"
    ]
    assert ("html", {"lang": "en"}) in page.elements


def test_every_element_is_closed_in_order() -> None:
    void = {"meta", "input", "br", "path", "rect"}

    class Nesting(HTMLParser):
        stack: list[str]

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.stack += [] if tag in void else [tag]

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    summary = campaign(phase(), second_phase())
    parser = Nesting()
    parser.stack = []
    parser.feed(render_html(summary, curves(summary), trial_records(summary)))
    parser.close()
    assert parser.stack == []


def test_every_trial_is_on_the_page_and_there_is_no_table_without_records() -> None:
    summary = campaign()
    page = Page(render_html(summary, curves(summary), trial_records(summary)))
    assert len(page.json("explored")["trials"]) == 15
    assert "15 trials, with those that a phase reuses from an earlier one. Open a trial" in page.text
    without = Page(render_html(summary, curves(summary)))
    assert without.json("explored")["trials"] == [] and "Every trial of the campaign" not in without.text


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_inert_in_the_data_of_the_trials(name: str) -> None:
    summary = hostile_campaign(name)
    records = trial_records(summary, status="failed", error=name)
    records = [
        replace(r, config={name: name, f"{name}2": r.seed}, metrics={name: 1.0}, reused_from=name) for r in records
    ]
    text = render_html(summary, curves(summary), records)
    page = Page(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert page.script_ids == [None, "figures", "explored", "plotly", None]
    assert "<" not in page.script("explored") and "<" not in page.script("figures")
    assert page.json("explored")["trials"][0][6] == fmt.reason(name)


def test_a_page_with_its_figures_has_less_than_three_megabytes() -> None:
    summary = campaign(phase(), second_phase())
    assert 1_500_000 < len(render_html(summary, curves(summary), trial_records(summary))) < 3_000_000


def test_speed_has_bars_once_an_arm_has_several_trials() -> None:
    summary = campaign()
    with_bars = Page(render_html(summary, [], trial_records(summary))).text
    assert "of the mean speed of an arm's trials" in with_bars
    assert "of the mean speed" not in Page(render_html(summary, [])).text


def test_the_exception_comes_first_and_the_indentation_of_a_traceback_is_kept() -> None:
    summary = campaign()
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\n    <open>()\nOSError: no disk'
    summary["problems"] = [
        {
            "phase": "alpha",
            "arm": "b",
            "seed": 1,
            "trial_id": "t",
            "status": "failed",
            "error": "OSError: no disk",
            "traceback": trace,
        }
    ]
    text = render_html(summary, [])
    assert "\n    &lt;open&gt;()\n" in text
    assert text.index("OSError: no disk") < text.index("Traceback (most recent call last)")


def test_curves_can_be_drawn_over_what_was_logged_only() -> None:
    summary = campaign()
    rows = curves(summary)
    options = {}
    for kind, logged in {"bare": rows, "timed": [row | {"tokens_per_second": 500.0} for row in rows]}.items():
        page = Page(render_html(summary, logged, trial_records(summary)))
        options[kind] = [
            str(tag["value"])
            for tag in page.tags("option")
            if tag.get("value") in ("tokens", "steps", "seconds", "elapsed", "flops")
        ]
    assert options == {"bare": ["tokens", "steps"], "timed": ["tokens", "steps", "seconds"]}


def timed(rows: list[Summary]) -> list[Summary]:
    """Rows with times and FLOPs that no other column tells: the first thousand tokens take 30 seconds to compile."""
    return [
        row
        | {"tokens_per_second": 500.0, "flops": 7.0 * row["tokens"]}
        | {"train_seconds": 30 + row["step"] * 2.0, "seconds": 40 + row["step"] * 3.0}
        for row in rows
    ]


def test_recorded_seconds_and_flops_take_the_place_of_computed_ones() -> None:
    summary = campaign()
    page = Page(render_html(summary, timed(curves(summary)), trial_records(summary)))
    axes = [tag["value"] for tag in page.tags("option") if tag.get("value") in ("seconds", "elapsed", "flops")]
    assert axes == ["seconds", "elapsed", "flops"]
    val = next(trace for trace in page.json("figures")[1]["data"] if trace["mode"] == "lines+markers")
    assert val["meta"]["steps"][:2] == [0, 10]
    assert val["meta"]["seconds"][:2] == [30, 50]
    assert val["meta"]["elapsed"][:2] == [40, 70]
    assert val["meta"]["flops"][:2] == [0, 70_000]
    assert "recorded" not in page.text


def test_one_trial_without_recorded_times_makes_all_curves_of_its_phase_computed_and_the_page_says_so() -> None:
    summary = campaign()
    rows = timed(curves(summary))
    rows[-1] = rows[-1] | {"train_seconds": None}
    page = Page(render_html(summary, rows, trial_records(summary)))
    val = next(trace for trace in page.json("figures")[1]["data"] if trace["mode"] == "lines+markers")
    assert val["meta"]["seconds"][:2] == [0, 20]  # 10,000 tokens at 500 a second
    assert "Seconds of training are tokens over the mean speed so far, because not every trial" in page.text


def test_curves_are_those_of_the_campaigns_own_metric_first_with_its_direction() -> None:
    summary = campaign(phase(metric={"name": "accuracy", "goal": "maximize"}))
    rows = [row | {"accuracy": row["val_loss"] and 1 / row["val_loss"], "zeal": 1.0} for row in curves(summary)]
    details = Details(trial_records(summary), metrics=("accuracy", "zeal"))
    page = Page(html.render_html(from_json(CampaignSummary, summary), rows, details))
    (shown,) = page.json("explored")["phases"]
    assert [curve["name"] for curve in shown["curves"]] == ["accuracy", "val_loss", "train_loss", "zeal"]
    assert [curve["goal"] for curve in shown["curves"]] == ["maximize", "minimize", "minimize", None]
    assert "of accuracy at each evaluation over training tokens, paired by seed; higher is better" in page.text
    first = page.json("figures")[shown["curves"][0]["figure"]]
    assert first["layout"]["yaxis"]["title"]["text"] == "accuracy"
    baseline = next(n for n, arm in enumerate(shown["arms"]) if arm["verdict"] == "baseline")
    ends = {baseline: 0.0} | {
        arm: means[-1] for arm, means, _ in shown["curves"][0]["differences"]["baselines"][str(baseline)]["arms"]
    }
    last = [row for row in rows if row["accuracy"] and row["step"] == 40]
    means = {
        a["arm"]: fmean(row["accuracy"] for row in last if row["arm"] == a["arm"]) for a in summary["phases"][0]["arms"]
    }
    names = [arm["name"] for arm in shown["arms"]]
    for arm, difference in ends.items():
        assert difference == pytest.approx(means[names[arm]] - means[names[baseline]], abs=1e-5)
    assert [curve["name"] for curve in shown["curves"] if "whether lower or higher" in curve["note"]] == ["zeal"]
