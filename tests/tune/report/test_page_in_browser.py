"""The report in a real browser: what a reader clicks and types, against pandas and SciPy on the campaign's files."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from scipy import stats

from ngpt.config.visible import visible
from ngpt.data.loader import EvalSet
from ngpt.model.gpt import GPT
from ngpt.training.evaluation import METRICS, EvalMetric
from tests.helpers import ROOT
from tests.helpers.tiny_campaign import train_all, write_file
from tune.report.explorer import Details
from tune.report.html import render_html
from tune.storage.summaries import ArmSummary, CampaignSummary, PhaseSummary, TrialCounts, TrialProblem, TrialRecord

playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'ngpt-campaign[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
MOST = 120_000  # milliseconds: a loaded machine is slow, not wrong
HOSTILE = "<img src=x onerror=alert(1)></script><script>alert(2)</script>'\"&amp;"


class Opened:
    """A page in a browser that may load nothing but the file itself."""

    def __init__(self, browser: Any, file: Path, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
        self.context.set_default_timeout(MOST)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog {dialog.message}"))
        self.page.goto(file.as_uri())
        self.page.locator("#plotly").wait_for(state="detached")  # it is removed once it is unpacked

    def _route(self, route: Any) -> None:
        self.requests.append(route.request.url)
        if route.request.url.startswith("file://"):
            route.continue_()
        else:
            route.abort()

    def plot(self, selector: str) -> Any:
        """Scrolls to a plot, waits until it is drawn, and returns its traces."""
        place = self.page.locator(selector).first
        place.scroll_into_view_if_needed()
        place.locator(".main-svg").first.wait_for()
        self.settle()
        return place.evaluate("place => JSON.parse(JSON.stringify(place.data))")

    def settle(self) -> None:
        """Waits until every redraw that was asked for is done."""
        self.page.locator(".plot[aria-busy]").first.wait_for(state="detached")

    def cells(self, column: int) -> list[str]:
        """The texts of a column of the table of trials."""
        return self.page.locator(f"#trial-table tbody tr > :nth-child({column})").all_inner_texts()

    def heads(self) -> list[str]:
        return self.page.locator("#trial-table thead th").all_inner_texts()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as tools:
        chromium = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A campaign of two phases with three seeds, trained for real, in a folder whose name must be quoted."""
    folder = tmp_path_factory.mktemp("a reader's results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METRICS, "accuracy", EvalMetric(accuracy, "maximize"))
        file = write_file(folder, corpus, seeds="[1, 2, 3]", steps=12, every=3)
        file.write_text(file.read_text().replace("tracker: {", "tracker: {sample_tokens: 40, "))
        train_all(file, folder / "tiny")
    return folder / "tiny"


def accuracy(model: GPT, eval_set: EvalSet) -> float:
    """The share of tokens that the model finds the most likely ones, as a plug-in could measure it."""
    hits = [(model(idx).argmax(-1) == targets).float().mean() for idx, targets in eval_set.batches]
    return float(torch.stack(hits).mean())


@pytest.fixture
def opened(browser: Any, root: Path) -> Iterator[Opened]:
    opened = Opened(browser, root / "report.html")
    yield opened
    opened.context.close()
    assert opened.complaints == []
    assert opened.requests == [(root / "report.html").as_uri()]


@pytest.fixture(scope="module")
def trials(root: Path) -> pd.DataFrame:
    """The records of all phases, with settings and metrics as columns."""
    lines = [
        line for phase in ("alpha", "projection") for line in (root / phase / "trials.jsonl").read_text().split("\n")
    ]
    records = [json.loads(line) for line in lines if line]
    rows = [
        {"id": r["trial_id"], "phase": r["phase"], "arm": r["arm"], "seed": r["seed"], **r["config"], **r["metrics"]}
        for r in records
    ]
    return pd.DataFrame(rows)


def test_every_figure_is_drawn_and_says_what_it_shows(opened: Opened) -> None:
    places = opened.page.locator(".plot")
    assert places.count() >= 8
    for n in range(places.count()):
        places.nth(n).scroll_into_view_if_needed()
        places.nth(n).locator(".main-svg").first.wait_for()
        assert len(places.nth(n).get_attribute("aria-label") or "") > 20


def test_columns_sort_both_ways_by_mouse_and_keyboard(opened: Opened, trials: pd.DataFrame) -> None:
    place = opened.heads().index("val_loss") + 1
    head = opened.page.locator(f"#trial-table thead th:nth-child({place})")
    button = '#trial-table [data-sort="val_loss"]'
    assert head.get_attribute("aria-sort") == "none"
    expected = [f"{loss:.4f}" for loss in sorted(trials.val_loss)]
    opened.page.click(button)
    assert (head.get_attribute("aria-sort"), opened.cells(place)) == ("ascending", expected)
    assert opened.page.evaluate("document.activeElement.dataset.sort") == "val_loss"
    opened.page.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), opened.cells(place)) == ("descending", expected[::-1])


def test_trials_are_filtered_by_phase_status_and_words(opened: Opened, trials: pd.DataFrame) -> None:
    page, count = opened.page, opened.page.locator("#trial-count")
    assert count.inner_text() == f"{len(trials)} of {len(trials)} trials"
    page.select_option("[name=phase]", label="projection")
    n = (trials.phase == "projection").sum()
    assert len(opened.cells(1)) == n and count.inner_text() == f"{n} of {len(trials)} trials"
    page.fill("[name=text]", "project_every=3 SEED=2")
    n = ((trials.phase == "projection") & (trials.project_every == 3) & (trials.seed == 2)).sum()
    assert len(opened.cells(1)) == n == 1
    page.fill("[name=text]", "no such trial")
    assert opened.cells(1) == [] and count.inner_text() == f"0 of {len(trials)} trials"


@pytest.mark.parametrize("setting", ["model.alpha", "project_every"])
def test_groups_have_the_numbers_of_pandas(opened: Opened, trials: pd.DataFrame, setting: str) -> None:
    for metric in ("val_loss", "train_loss"):
        opened.page.select_option("[name=metric]", label=metric)
        opened.page.select_option("[name=group]", label=setting)
        once = trials.drop_duplicates("id")  # a phase reuses trials of the other
        groups = once.groupby(setting)[metric].agg(["count", "mean", "std", "sem"])
        columns = [opened.cells(n) for n in range(1, 6)]
        shown = sorted(zip(*columns, strict=True), key=lambda row: float(row[0]))
        assert opened.heads() == [setting, "n", "mean", "sd", "stderr"]
        for row, (value, expected) in zip(shown, groups.iterrows(), strict=True):
            assert (float(row[0]), int(row[1])) == (pytest.approx(float(str(value))), expected["count"])
            assert [float(text) for text in row[2:]] == pytest.approx(list(expected[1:]), rel=1e-3, abs=6e-5)


def test_a_trial_opens_in_place_and_its_command_generates_text(opened: Opened, trials: pd.DataFrame) -> None:
    page = opened.page
    own = trials[(trials.phase == "alpha") & (trials.arm == "alpha=0.4")].iloc[0]
    page.fill("[name=text]", own.id)
    button = page.locator("#trial-table button.open").first
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    detail = page.locator("#trial-table tr.detail")
    assert detail.locator("tbody tr").all_inner_texts() == ["model.alpha\t0.05\t0.4"]
    val = opened.plot("#trial-table tr.detail .plot")[-1]
    logged = pd.read_json(page_folder(page) / "trials" / own.id / "metrics.jsonl", lines=True).dropna(subset="val_loss")
    last = logged[logged.tokens > 0].drop_duplicates("step", keep="last")  # from the first evaluation on
    assert val["name"] == "validation" and val["x"] == list(last.tokens)
    assert val["y"] == pytest.approx(list(last.val_loss), abs=1e-4)
    choice = detail.locator("select[name=detail-curve]")
    assert choice.locator("option").all_inner_texts()[:5] == [
        "loss",
        "val_bpb",
        "accuracy",
        "tokens_per_second",
        "grad_norm",
    ]
    choice.select_option("grad_norm")
    norms = pd.read_json(page_folder(page) / "trials" / own.id / "metrics.jsonl", lines=True).dropna(subset="grad_norm")
    baseline, line = opened.plot("#trial-table tr.detail .plot")
    assert (baseline["name"], line["x"]) == ("baseline, same seed", list(norms.tokens))
    assert line["y"] == pytest.approx(list(norms.grad_norm), rel=1e-4)
    text = (page_folder(page) / "trials" / own.id / "sample.txt").read_text()
    assert len(text) > 20 and detail.locator("pre.sample").text_content() == visible(text.rstrip(), keep="\n\t")
    names = set(pd.read_json(page_folder(page) / "trials" / own.id / "histograms.jsonl", lines=True).name)
    assert set(detail.locator(".violins figcaption").all_inner_texts()) == names
    assert detail.locator(".violins svg path").count() >= len(names)
    python, *arguments = shlex.split(detail.locator("[data-command]").inner_text())
    assert python == "python"
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    button.click()
    assert detail.count() == 0 and button.get_attribute("aria-expanded") == "false"


def page_folder(page: Any) -> Path:
    return Path(page.evaluate("decodeURIComponent(location.pathname)")).parent


def test_an_arm_opens_below_its_row_and_leads_to_its_trials(opened: Opened, trials: pd.DataFrame) -> None:
    page = opened.page
    row = page.locator("#phase-1 tr[data-arm]", has_text="alpha=0.4")
    row.locator("button.open").click()
    detail = page.locator("#phase-1 tr.detail")
    assert detail.locator("table tbody tr").all_inner_texts() == ["model.alpha\t0.05\t0.4"]
    own = trials[(trials.phase == "alpha") & (trials.arm == "alpha=0.4")].sort_values("seed")
    expected = [f"seed {seed}: {loss:.4f}" for seed, loss in zip(own.seed, own.val_loss, strict=True)]
    assert detail.locator(".tools button").all_inner_texts()[:3] == expected
    assert len(opened.plot("#phase-1 tr.detail .plot")) == 3
    detail.locator(".tools button").nth(1).click()
    focused = page.evaluate("document.activeElement.closest('tr').innerText")
    name, *others = focused.split("\t")
    assert name.startswith("alpha=0.4") and others[:2] == ["alpha", "2"]
    assert page.locator("#trial-table tr.detail").count() == 1


def test_differences_against_a_baseline_of_the_readers_choice(opened: Opened, root: Path, trials: pd.DataFrame) -> None:
    logged = pd.read_parquet(root / "alpha" / "curves.parquet").dropna(subset="val_loss")
    by_arm = {arm: rows.pivot(index="tokens", columns="seed", values="val_loss") for arm, rows in logged.groupby("arm")}
    for chosen, other in (("alpha=0.05", "alpha=0.4"), ("alpha=0.4", "alpha=0.05")):
        opened.page.select_option('[data-differences="0"]', label=chosen)
        band, line = opened.plot('[data-differences-plot="0"]')
        assert (line["name"], line["x"]) == (other, list(by_arm[chosen].index))
        for n, tokens in enumerate(line["x"]):
            test = stats.ttest_rel(by_arm[other].loc[tokens], by_arm[chosen].loc[tokens])
            interval = test.confidence_interval(0.95)
            assert line["customdata"][n] == pytest.approx([interval.low, interval.high], abs=2e-5)
        assert band["y"][: len(line["x"])] == pytest.approx([high for _, high in line["customdata"]])
        rows = opened.page.locator('[data-final="0"] tbody tr')
        assert rows.count() == (0 if chosen == "alpha=0.05" else 1)  # the own baseline has its table above
    own = trials[trials.phase == "alpha"].pivot(index="seed", columns="arm", values="val_loss")
    test = stats.ttest_rel(own["alpha=0.05"], own["alpha=0.4"])
    interval = test.confidence_interval(0.95)
    name, difference, p, _ = rows.first.inner_text().replace("\u2212", "-").split("\t")
    assert name == "alpha=0.05"
    numbers = [float(text.strip("[],")) for text in difference.split()]
    assert numbers[1:] == pytest.approx([interval.low, interval.high], abs=6e-5)
    assert float(p.strip("<")) == pytest.approx(max(test.pvalue, 0.001), rel=0.06)


def test_curves_over_other_axes_and_smoothed(opened: Opened, root: Path) -> None:
    page = opened.page
    figure = '#phase-1 .plot[aria-label^="Line plot: the chosen metric"]'
    logged = pd.read_parquet(root / "alpha" / "curves.parquet")
    own = logged[(logged.arm == "alpha=0.4") & logged.train_loss.notna()].drop_duplicates(["seed", "step"], keep="last")

    def train() -> dict[str, Any]:
        (trace,) = [
            t
            for t in opened.plot(figure)
            if t["name"] == "alpha=0.4" and t["meta"]["kind"] == "line" and "opacity" in t
        ]
        return trace

    steps = sorted(set(own.step))
    axis = page.locator('#phase-1 select[data-option="axis"]')
    assert axis.locator("option").all_inner_texts() == [
        *("training tokens", "steps"),
        *("seconds of training", "seconds since the start", "FLOPs"),
    ]
    axis.select_option("steps")
    assert train()["x"] == steps and page.locator("#phase-1 h3", has_text="val_loss over steps").count() == 1
    for name, column in {"seconds": "train_seconds", "elapsed": "seconds", "flops": "flops"}.items():
        axis.select_option(name)
        means_of_axis: Any = own.groupby("step")[column].mean()
        assert train()["x"] == pytest.approx(list(means_of_axis[steps]), rel=1e-4)
    means = own.groupby("step").train_loss.mean()
    assert train()["y"] == pytest.approx(list(means), abs=1e-4)
    page.locator('#phase-1 [data-option="smoothing"]').fill("0.8")
    assert train()["y"] == pytest.approx(list(means.ewm(alpha=0.2, adjust=True).mean()), abs=1e-4)
    assert not [t for t in opened.plot(figure) if t["meta"]["kind"] == "band"]


def test_curves_and_differences_of_a_metric_of_the_readers_choice(opened: Opened, root: Path) -> None:
    page = opened.page
    logged = pd.read_parquet(root / "alpha" / "curves.parquet").dropna(subset="accuracy")
    choice = page.locator('#phase-1 [data-curves="0"]')
    assert choice.locator("option").all_inner_texts() == ["val_loss", "train_loss", "val_bpb", "accuracy"]
    assert choice.input_value() == "0"
    figure = '#phase-1 .plot[aria-label^="Line plot: the chosen metric"]'
    for name, words in {"val_bpb": "lower is better", "accuracy": "higher is better"}.items():
        choice.select_option(label=name)
        means: Any = logged.groupby(["arm", "step"])[name].mean()
        lines = {t["name"]: t for t in opened.plot(figure) if t["meta"]["kind"] == "line"}
        assert set(lines) == set(logged.arm)
        for arm, line in lines.items():
            assert line["y"] == pytest.approx(list(means[arm]), rel=1e-4)
        page.select_option('[data-differences="0"]', label="alpha=0.05")
        _, line = opened.plot('[data-differences-plot="0"]')
        assert line["y"] == pytest.approx(list(means["alpha=0.4"] - means["alpha=0.05"]), rel=1e-3, abs=1e-6)
        title = page.locator('[data-differences-plot="0"]').evaluate("place => place.layout.yaxis.title.text")
        assert title == f"difference in {name}   " + ("better →" if name == "accuracy" else "← better")
        assert page.locator("#phase-1 h3", has_text=f"Difference in {name} during training").count() == 1
        assert words in page.locator('[data-differences-note="0"]').inner_text()
        assert not page.locator('[data-differences-plot="0"]').evaluate("place => (place.layout.shapes || []).length")
        page.select_option('[data-differences="0"]', label="alpha=0.4")
        assert page.locator('[data-final="0"] tr').count() == 0  # verdicts are those of the campaign's metric


def test_the_curves_of_an_opened_arm_begin_in_their_range(opened: Opened, trials: pd.DataFrame) -> None:
    row = opened.page.locator("#phase-1 tr[data-arm]", has_text="alpha=0.4")
    row.locator("button.open").click()
    drawn = opened.plot("#phase-1 tr.detail .plot")
    low, high = opened.page.locator("#phase-1 tr.detail .plot").evaluate("place => place.layout.yaxis.range")
    assert len(drawn) == 3
    for line in drawn:
        assert len(line["x"]) == 4 and line["x"][0] > 0  # evaluations after 3, 6, 9 and 12 steps
        assert low < min(line["y"]) <= max(line["y"]) < high


def tables(opened: Opened) -> dict[str, Any]:
    """What the browser tells screen readers about the tables: how many parts of each role, and the heads of columns."""
    nodes = opened.context.new_cdp_session(opened.page).send("Accessibility.getFullAXTree")["nodes"]
    shown = [node for node in nodes if not node["ignored"]]
    roles = Counter(node["role"]["value"] for node in shown)
    names = [node["name"]["value"] for node in shown if node["role"]["value"] == "columnheader"]
    return {role: roles[role] for role in ("table", "row", "rowheader", "cell", "columnheader")} | {"heads": names}


def test_tables_mean_the_same_to_screen_readers_on_a_narrow_screen(browser: Any, root: Path) -> None:
    found = []
    for width in (1280, 390):
        opened = Opened(browser, root / "report.html", viewport={"width": width, "height": 900})
        opened.page.locator("#phase-1 button.open").first.click()
        opened.page.locator("#phase-1 tr.detail table").first.wait_for()
        found.append(tables(opened))
        opened.context.close()
    wide, narrow = found
    assert wide["table"] >= 5 and wide["cell"] > 100 and {"arm", "seed", "Holm p", "setting"} <= set(wide["heads"])
    assert narrow == wide


def test_a_pinned_arm_is_in_front_and_the_others_fade(opened: Opened) -> None:
    page = opened.page
    figure = '#phase-2 .plot[aria-label^="Line plot: the chosen metric"]'
    opened.plot(figure)
    row = page.locator("#phase-2 tr[data-arm]:not(:has-text('baseline'))").first
    name = row.locator("b").first.inner_text()
    pin = row.locator("button.pin")
    pin.click()
    assert (pin.get_attribute("aria-pressed"), pin.inner_text()) == ("true", "pinned")
    traces = opened.plot(figure)
    baseline = page.evaluate("(({arms, baseline}) => arms[baseline].name)(explored.phases[1])")
    assert {t["name"] for t in traces if t["showlegend"]} == {name, baseline}
    assert traces[-1]["name"] == name
    assert (
        "pinned" in page.locator('[data-shown="1"]').inner_text() or page.locator('[data-differences="1"]').count() == 0
    )
    pin.click()
    assert pin.get_attribute("aria-pressed") == "false"
    assert len([t for t in opened.plot(figure) if t["showlegend"]]) >= 2


def background(page: Any) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_the_theme_is_that_of_the_system_until_the_reader_chooses(browser: Any, root: Path) -> None:
    opened = Opened(browser, root / "report.html", color_scheme="dark")
    page, white, black = opened.page, "rgb(255, 255, 255)", "rgb(20, 23, 27)"
    assert background(page) == black
    page.click("#theme")
    assert (background(page), page.inner_text("#theme")) == (white, "theme: light")
    page.reload()
    assert background(page) == white
    page.click("#theme")
    assert background(page) == black
    page.emulate_media(color_scheme="light")
    assert background(page) == black
    page.emulate_media(media="print")
    assert background(page) == white
    opened.context.close()
    assert opened.complaints == []


def test_on_paper_everything_is_open_and_nothing_can_be_clicked(opened: Opened) -> None:
    page = opened.page
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    opened.settle()
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".screen:visible, button.pin:visible").count() == 0
    assert page.locator(".plot .main-svg").count() >= page.locator(".plot").count()
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    assert page.locator("#theme:visible").count() == 1


@pytest.mark.parametrize("width", [390, 1280])
def test_no_width_makes_the_page_scroll_sideways(browser: Any, root: Path, width: int) -> None:
    opened = Opened(browser, root / "report.html", viewport={"width": width, "height": 900})
    opened.page.click("#trial-table button.open >> nth=0")
    opened.plot("#trial-table tr.detail .plot")
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 390:  # the head of the table, which sorts, is hidden
        opened.page.select_option("[name=sort]", label="val_loss \u2193")
        losses = opened.page.locator('#trial-table td[data-name="val_loss"]').all_inner_texts()
        assert losses == sorted(losses, reverse=True)
    opened.context.close()
    assert opened.complaints == []


def test_many_trials_with_hostile_names_open_and_are_shown_a_hundred_at_a_time(browser: Any, tmp_path: Path) -> None:
    arms = tuple(ArmSummary(f"{HOSTILE} {n}", n, verdict="worse" if n else "baseline", n=3) for n in range(400))
    records = [
        TrialRecord(
            HOSTILE,
            HOSTILE,
            arm.arm,
            f"t{n}-{seed}",
            seed,
            {},
            {HOSTILE: f"{HOSTILE}{n % 2}"},
            "failed",
            {"val_loss": n + seed / 10},
            error=f"OSError: {HOSTILE}",
        )
        for n, arm in enumerate(arms)
        for seed in (1, 2, 12)
    ]
    problems = tuple(
        TrialProblem(HOSTILE, r.arm, r.seed, r.trial_id, "failed", r.error, f"Traceback\n  {HOSTILE}") for r in records
    )
    phase = PhaseSummary(phase=HOSTILE, arms=arms, baseline=arms[0].arm, trials=TrialCounts(1200, 0, failed=1200))
    summary = CampaignSummary(HOSTILE, phases=(phase,), problems=problems, trials=phase.trials)
    file = tmp_path / "report.html"
    file.write_text(render_html(summary, [], Details(records)), encoding="utf-8")
    opened = Opened(browser, file)
    page = opened.page
    assert len(opened.cells(1)) == 100 and "the first 100 are shown" in page.inner_text("#trial-count")
    for word, found in (("seed=1", 400), ("seed=", 1200), ("seed=12", 400)):  # seed 12 is not seed 1
        page.fill("[name=text]", word)
        assert page.inner_text("#trial-count").startswith(f"{found} of 1200 trials")
    page.fill("[name=text]", "")
    page.click("#more-trials")
    assert len(opened.cells(1)) == 600
    page.select_option("[name=group]", label=HOSTILE)
    assert sorted(opened.cells(1)) == [f"{HOSTILE}0", f"{HOSTILE}1"] and opened.cells(2) == ["600", "600"]
    page.select_option("[name=group]", value="")
    page.click("#trial-table button.open >> nth=0")
    assert HOSTILE in page.inner_text("#trial-table tr.detail .exception")
    failure = page.locator("#failure-1")
    assert failure.locator(".exception").inner_text() == f"OSError: {HOSTILE} (1200 trials)"
    assert not failure.locator("pre").is_visible()
    failure.locator("summary", has_text="traceback").click()
    assert failure.locator("pre").inner_text() == f"Traceback\n  {HOSTILE}"
    opened.context.close()
    assert opened.complaints == [] and opened.requests == [file.as_uri()]
