"""The pages of a results folder: what they say is what the summary says, from the journal as it is now.

Trials are not trained here, except in the slow test, where a browser watches a campaign.
"""

import gzip
import html
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.other_user import read_only_copy
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune import campaign_pages
from tune import format as fmt
from tune.campaign_pages import Cached, CampaignPages
from tune.report.server import Page, PageServer
from tune.report.wording import effect
from tune.storage.activity import ActivityFile
from tune.storage.lock import ResultsLock
from tune.storage.summaries import Delta

ALPHA = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with one finished campaign."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        with session_on(write_file(folder, corpus, phases=ALPHA), folder / "results" / "tiny") as session:
            drive(begun(session), lambda spec: pretend(spec, gain=5.0))
            session.end()
    return folder / "results"


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    return shutil.copytree(results, tmp_path / "results")


def read(pages: CampaignPages, path: str = "/") -> str:
    page = pages(path)
    assert page is not None and page.status == 200
    return page.body.decode()


def cells(text: str) -> dict[str, str]:
    """The words of each row of the index, by name of the campaign."""
    rows = re.findall(r'<tr id="row-([^"]*)"(.*?)</tr>', text, flags=re.DOTALL)
    return {name: " ".join(html.unescape(re.sub(r"<[^>]*>", " ", row)).split()) for name, row in rows}


def state(pages: CampaignPages, path: str) -> dict[str, Any]:
    return json.loads(read(pages, path))


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_the_index_says_what_the_summary_of_a_campaign_says(results: Path) -> None:
    summary = json.loads((results / "tiny" / "summary.json").read_text())
    text = read(CampaignPages(results))
    row = cells(text)["tiny"]
    assert summary["status"] == "finished" and summary["answer"]["winner"] == "alpha=0.4"
    words = [
        "finished",
        "alpha=0.4",
        "better; not confirmed yet",
        effect(Delta(**summary["answer"]["delta"])),
        "val_loss",
    ]
    words += [str(summary["trials"]["total"]), fmt.count(summary["tokens"])]
    assert [word for word in words if word not in row] == []
    assert 'href="/tiny/"' in text and f'data-tokens="{summary["tokens"]}"' in text


def test_the_page_of_a_campaign_is_its_report_with_a_line_that_follows_it(results: Path) -> None:
    pages = CampaignPages(results)
    page = pages("/tiny/")
    assert page is not None
    text, now = page.body.decode(), state(pages, "/tiny/state")
    assert json.loads((results / "tiny" / "summary.json").read_text())["answer"]["sentence"] in html.unescape(text)
    assert f'data-version="{now["version"]}"' in text and now["state"] == "finished" and now["parts"] == ["4 trials"]
    assert "connect-src 'self'" in page.policy and "frame-ancestors 'none'" in page.policy
    assert "unsafe-inline" not in page.policy.partition("script-src")[2].partition(";")[0]
    assert gzip.decompress(page.compressed) == page.body


def test_a_running_campaign_is_read_again_as_it_goes_on(tmp_path: Path, corpus: Path, no_report: None) -> None:
    pages = None
    with session_on(write_file(tmp_path, corpus, phases=ALPHA), tmp_path / "results" / "tiny") as session:
        begun(session)
        pages = CampaignPages(tmp_path / "results")
        drive(session, most=2)
        before, first = state(pages, "/tiny/state"), read(pages, "/tiny/")
        assert before["state"] == "running" and before["parts"][:2] == ["2 of 4 trials", "phase alpha, 1 of 1"]
        assert "It is running. This page follows it." in first
        assert "running" in cells(read(pages))["tiny"] and "2 of 4" in cells(read(pages))["tiny"]
        index = state(pages, "/-/state")
        drive(session)
        let_rest(pages)
        after, second = state(pages, "/tiny/state"), read(pages, "/tiny/")
        assert after["version"] != before["version"] and f'data-version="{after["version"]}"' in second
        assert after["parts"][0] == "4 trials" and second != first
        assert state(pages, "/-/state")["version"] != index["version"]
        session.end()
    let_rest(pages)
    assert state(pages, "/tiny/state")["state"] == "finished"


def test_a_campaign_is_there_while_its_data_are_prepared(tmp_path: Path) -> None:
    root = tmp_path / "soon"
    pages = CampaignPages(tmp_path)
    with ResultsLock(root), ActivityFile(root, campaign="soon") as activity, activity.doing("preparing data"):
        assert "starting preparing data" in cells(read(pages))["soon"]
        assert state(pages, "/soon/state")["state"] == "starting" and "soon is starting" in read(pages, "/soon/")
    assert cells(read(pages)) == {} and pages("/soon/") is None


def let_rest(pages: CampaignPages) -> None:
    """Lets everything be read again at once, as after the pause that follows a costly rendering."""
    for campaign in pages._campaigns.values():
        for cached in (campaign.row, campaign.report):
            cached._keep_until = 0.0


def test_many_browsers_cost_one_rendering(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    real = campaign_pages.render_html
    monkeypatch.setattr(
        campaign_pages, "render_html", lambda *args, **kwargs: rendered.append(1) or real(*args, **kwargs)
    )
    pages = CampaignPages(results)
    assert len({id(pages("/tiny/")) for _ in range(10)}) == 1
    assert {state(pages, "/tiny/state")["version"] for _ in range(10)} and rendered == [1]


def test_what_was_costly_is_not_made_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    for name in ("monotonic", "thread_time"):
        monkeypatch.setattr(time, name, lambda: clock[0])
    made: list[Any] = []

    def make(fingerprint: Any) -> Any:
        clock[0] += 2.0
        made.append(fingerprint)
        return fingerprint

    cached = Cached(make)
    assert cached.get((1,)) == (1,) and cached.get((1,)) == (1,)
    assert cached.get((2,)) == (1,) and cached.current((2,)) == (1,)
    clock[0] += 19.0
    assert cached.get((2,)) == (1,)
    clock[0] += 2.0
    assert cached.current((2,)) == (2,) and cached.get((2,)) == (2,)
    cached.drop()
    assert cached.peek() is None and cached.get((2,)) == (2,) and made == [(1,), (2,), (2,)]


@pytest.mark.parametrize(
    "path",
    [
        "/../tiny/",
        "/tiny/../tiny/",
        "/..",
        "/%2e%2e/",
        "/tiny/journal.jsonl",
        "/tiny/%2e%2e/state",
        "/tiny//state",
        "//tiny/",
        "/tiny/state/",
        "/etc/passwd",
        "/-/../seeds.jsonl",
        "/-/live.js.j2",
        "/-/..",
        "/seeds.jsonl",
        "/tiny\0/",
        "/tiny\\..\\",
        "/./tiny/",
        "",
        "tiny",
        "*",
    ],
)
def test_only_pages_are_served_and_no_file(results: Path, path: str) -> None:
    assert CampaignPages(results)(path) is None


def test_a_path_without_its_slash_leads_to_the_page(results: Path) -> None:
    page = CampaignPages(results)("/tiny")
    assert page is not None and page.headers == {"Location": "/tiny/"}


def test_a_campaign_that_cannot_be_read_is_a_row_with_its_reason(copy: Path, tmp_path: Path) -> None:
    journal = (copy / "tiny" / "journal.jsonl").read_text()
    forged: dict[str, Callable[[Path], Any]] = {
        "edited": lambda path: path.write_text(journal.replace("alpha=0.4", "alpha=0.3")),
        "empty": lambda path: path.write_text(""),
        "binary": lambda path: path.write_bytes(b"\0\xff\n" * 9),
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "secret": lambda path: path.symlink_to("/etc/passwd"),
        "<i>x": lambda path: path.write_text(journal),
    }
    for name, make in forged.items():
        (copy / name).mkdir()
        make(copy / name / "journal.jsonl")
    shutil.copytree(copy / "tiny", tmp_path / "outside")
    (copy / "away").symlink_to(tmp_path / "outside")
    (copy / "latest").symlink_to("tiny")
    (copy / "trial").mkdir()
    (copy / "trial" / "journal.jsonl").write_text(journal)
    (copy / "trial" / "trials").mkdir()
    (copy / "trial" / "trials" / "x").symlink_to(tmp_path)
    text = read(pages := CampaignPages(copy))
    reasons = {
        "edited": "does not match its CRC",
        "empty": "no journal.jsonl with a campaign",
        "binary": "does not match its CRC",
        "fifo": "is a link, or not a file",
        "folder": "is a link, or not a file",
        "secret": "is a link, or not a file",
        "away": "a link out of this folder",
        "trial": "trials/x: it is a link",
        "&lt;i&gt;x": "cannot have this name",
    }
    rows = cells(text)
    assert {name: reason in rows[name] for name, reason in reasons.items()} == dict.fromkeys(reasons, True)
    assert "finished" in rows["tiny"] and "finished" in rows["latest"] and "<i>x" not in text and "root:x:" not in text
    assert "edited cannot be read" in read(pages, "/edited/") and "CRC" in state(pages, "/edited/state")["parts"][0]
    assert pages("/away/") is None and "root:x:" not in read(pages, "/secret/")


def test_what_no_reader_expects_is_a_row_and_one_line_on_stderr(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise KeyError("phase")

    monkeypatch.setattr(campaign_pages, "read_progress", fail)
    assert "internal error: KeyError: 'phase'" in cells(read(CampaignPages(results)))["tiny"]
    assert capsys.readouterr().err == "tiny: internal error: KeyError: 'phase'\n"


def test_a_folder_that_cannot_be_written_is_served_and_nothing_is_written(results: Path) -> None:
    read(CampaignPages(results), "/tiny/")  # imports what another user may not read
    before = contents(results)
    with read_only_copy(results) as served:
        pages = CampaignPages(served)
        assert "finished" in cells(read(pages))["tiny"] and "alpha=0.4" in read(pages, "/tiny/")
        assert state(pages, "/tiny/state")["state"] == "finished"
    read(CampaignPages(results))
    assert contents(results) == before


def test_campaigns_come_and_go_without_a_restart(copy: Path) -> None:
    pages = CampaignPages(copy)
    shutil.move(copy / "tiny", copy / "other")
    assert set(cells(read(pages))) == {"other"} and pages("/tiny/state") is None
    shutil.rmtree(copy / "other")
    assert "There is no campaign in this folder yet" in read(pages)
    shutil.rmtree(copy)
    assert "No such file or directory" in read(pages)


def test_the_results_of_one_campaign_are_served_without_an_index(results: Path) -> None:
    pages = CampaignPages(results / "tiny")
    page = pages("/")
    assert page is not None and page.headers == {"Location": "/tiny/"}
    assert 'data-home="/"' not in read(pages, "/tiny/") and pages("/-/state") is None and pages("/alpha/") is None


def test_with_many_campaigns_the_newest_have_rows(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_pages, "MAX_CAMPAIGNS", 2)
    for n in range(3):
        shutil.copytree(copy / "tiny", copy / f"old{n}")
        os.utime(copy / f"old{n}" / "journal.jsonl", (n, n))
    text = read(pages := CampaignPages(copy))
    assert list(cells(text)) == ["tiny", "old2"] and "2 older campaigns not shown" in text
    assert read(pages, "/old0/")


def test_what_takes_long_to_read_follows_with_the_next_answer(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(copy / "tiny", copy / "second")
    monkeypatch.setattr(campaign_pages, "READ_SECONDS", -1.0)
    pages = CampaignPages(copy)
    assert all("not read yet" in row for row in cells(read(pages)).values())
    monkeypatch.setattr(campaign_pages, "READ_SECONDS", 60.0)
    assert all("finished" in row for row in cells(read(pages)).values())


@pytest.mark.parametrize(("name", "reason"), [("missing", "does not exist"), ("file", "is not a folder")])
def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{name} {reason}; serve shows a folder of campaigns"):
        CampaignPages(tmp_path / name)


def test_the_scripts_are_served_with_their_type(results: Path) -> None:
    pages = CampaignPages(results)
    for name in ("live.js", "overview.js", "plotly.js"):
        page = pages(f"/-/{name}")
        assert isinstance(page, Page) and page.kind.startswith("text/javascript") and page.body


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking")
FOUR = """
  - name: alpha
    vary: {alpha: [0.05, 0.1, 0.2, 0.4]}
  - name: projection
    vary: {project_every: [3]}
"""


class Campaign:
    """A campaign that goes on by so many trials when it is told to, with a curve for each."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self._lock = ExitStack()
        file = write_file(folder, corpus, phases=FOUR)
        self.session = self._lock.enter_context(session_on(file, folder / "results" / "tiny"))
        begun(self.session)

    def end(self) -> None:
        self.session.end()
        self._lock.close()

    def train(self, most: int | None = None) -> None:
        for spec in drive(self.session, lambda spec: pretend(spec, gain=5.0), most=most):
            rows = (
                {"step": step, "tokens": 64 * step, "val_loss": 5 - 0.1 * step, "grad_norm": 1.0} for step in range(4)
            )
            log = self.session.root / "trials" / spec.trial_id / "metrics.jsonl"
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("".join(json.dumps(row) + "\n" for row in rows))


CURVES = '#phase-1 .plot[aria-label^="Line plot: the chosen metric"]'


def ranges(page: Any, plot: str) -> list[list[float]]:
    """What the axes of a plot show, x first."""
    return page.locator(plot).evaluate("({_fullLayout: {xaxis, yaxis}}) => [xaxis.range, yaxis.range]")


def zoom(page: Any, plot: str) -> list[list[float]]:
    """Zooms into the middle of a plot with the mouse; returns what it shows then."""
    page.locator(f"{plot} .main-svg").first.wait_for()
    page.locator(".plot[aria-busy]").first.wait_for(state="detached")
    before = ranges(page, plot)
    page.locator(plot).scroll_into_view_if_needed()
    box = page.locator(f"{plot} .nsewdrag").bounding_box()
    corners = [(box["x"] + box["width"] * part, box["y"] + box["height"] * part) for part in (0.25, 0.75)]
    page.mouse.move(*corners[0])
    page.mouse.down()
    page.mouse.move(*corners[1], steps=4)
    page.mouse.up()
    page.wait_for_function(
        "([place, x]) => String(document.querySelector(place)._fullLayout.xaxis.range) !== x",
        arg=[plot, ",".join(map(str, before[0]))],
    )
    return ranges(page, plot)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")
def test_a_browser_watches_a_campaign_without_reloading(tmp_path: Path, corpus: Path, no_report: None) -> None:
    """What the reader has opened and chosen stays; nothing is asked of other servers, and no script complains."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'ngpt-campaign[browser]'")
    campaign = Campaign(tmp_path, corpus)
    with playwright.sync_playwright() as driver:
        campaign.train(5)
        pages = CampaignPages(tmp_path / "results")
        with PageServer(pages, 0) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
            try:
                watch(browser, server.url, campaign, pages)
            finally:
                browser.close()
                server.shutdown()
                thread.join()


def watch(browser: Any, url: str, campaign: Campaign, pages: CampaignPages) -> None:
    complaints: list[str] = []
    requests: list[str] = []
    index, report = (browser.new_context().new_page() for _ in range(2))
    for page in (index, report):
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        page.evaluate("window.stays = true")
    report.click("text=tiny")
    report.wait_for_url("**/tiny/")
    report.evaluate("window.stays = true")
    progress, *_ = state(pages, "/tiny/state")["parts"]
    assert re.fullmatch(r"\d+ of \d+ trials", progress)
    report.wait_for_selector(f"#live >> text={progress}")
    index.wait_for_selector(f"#row-tiny >> text={progress.removesuffix(' trials')}")

    # The reader sorts, filters, pins, opens, zooms and scrolls.
    index.click("button[data-sort=tokens]")
    report.fill("#filters input[name=text]", "alpha=0.4")
    report.click("#trial-table button.open >> nth=0")
    report.click("#phase-1 tr[data-arm] button.pin >> nth=1")
    report.click("summary >> text=settings of the base")
    report.select_option("#phase-1 select[data-option=axis]", "steps")
    zoomed = zoom(report, CURVES)
    report.select_option("#trial-table select[name=detail-curve]", "grad_norm")
    pinned = report.text_content("#phase-1 tr:has(button.pin[aria-pressed=true]) button.open")
    report.locator("#trial-table").scroll_into_view_if_needed()
    plots = report.evaluate_handle("[...document.querySelectorAll('.js-plotly-plot')]")
    top = report.evaluate("document.querySelector('#trial-table').getBoundingClientRect().top")

    campaign.train()
    campaign.end()
    total = progress.split()[2]
    for page, selector in (
        (report, f"#live >> text=/^{total} trials$/"),
        (report, "#phase-2 tr[data-arm] >> nth=1"),
        (index, "#row-tiny .chip.finished"),
        (report, "#live .state >> text=finished"),
    ):
        while not page.locator(selector).count():
            let_rest(pages)
            page.wait_for_timeout(200)
    assert report.evaluate("window.stays") and index.evaluate("window.stays")
    assert index.get_attribute("th:has(button[data-sort=tokens])", "aria-sort") == "descending"
    assert report.input_value("#filters input[name=text]") == "alpha=0.4"
    assert report.locator("#trial-table button.open[aria-expanded=true]").count() == 1
    assert report.text_content("#phase-1 tr:has(button.pin[aria-pressed=true]) button.open") == pinned
    assert report.locator("details.base[open]").count() == 1
    assert report.input_value("#phase-1 select[data-option=axis]") == "steps"
    assert report.input_value("#trial-table select[name=detail-curve]") == "grad_norm"
    assert ranges(report, CURVES) == zoomed
    assert report.evaluate("plots => plots.some((plot) => plot.isConnected)", plots)  # redrawn, not drawn anew
    assert abs(report.evaluate("document.querySelector('#trial-table').getBoundingClientRect().top") - top) < 40
    report.locator(f"{CURVES} .nsewdrag").dblclick()
    report.wait_for_function(
        "([place, zoomed]) => String(document.querySelector(place)._fullLayout.xaxis.range) !== String(zoomed)",
        arg=[CURVES, zoomed[0]],
    )
    assert all(each.startswith(url) or each.startswith("blob:") for each in requests), set(requests)
    assert complaints == []
