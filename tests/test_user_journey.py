"""What a newcomer does in one sitting, with a wheel in an empty folder; each step uses what the one before has left."""

import importlib.util
import json
import re
import shutil
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from ngpt.code.version import own_version
from tests.helpers.clean_install import Installation, build, install, sources

pytestmark = pytest.mark.slow
pytest.importorskip("build")
pytest.importorskip("hatchling")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CAN_BROWSE = CHROMIUM is not None and importlib.util.find_spec("playwright") is not None
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
NAME = "quickstart-smoke"
RULE = '''
from ngpt.model.norm import l2_normalize
from ngpt.model.residual import RESIDUAL_RULES


def add_unit(x, f, alpha, norm):
    """Adds alpha times the normalized branch."""
    return norm(x + alpha * l2_normalize(f))


RESIDUAL_RULES["add_unit"] = add_unit
'''
QUESTION = """
campaign: mine
seeds: [1, 2]
base: {model: {n_layer: 1, n_head: 2, n_embd: 32, block_size: 32}, data: {tokenizer: "sentencepiece:512"},
       batch_size: 4, steps: 6, eval_every: 3, eval_tokens: 1024}
vary: {residual: [add_unit]}
"""
SCRIPT = """
import json, sys
from tune import load_results

results = load_results(sys.argv[1])
trials, arms, curves = (table.to_pandas() for table in (results.trials, results.arms, results.curves))
answer = {"trials": len(trials), "arms": len(arms), "last": curves.groupby("trial_id")["step"].max().unique().tolist()}
print(json.dumps(answer | {"val_loss": dict(zip(trials["trial_id"], trials["val_loss"]))}))
"""


def answer(run: Installation, *command: str | Path) -> Any:
    """Runs the installed command, which succeeds, and returns the JSON that it prints."""
    done = run("ngpt-campaign", *command, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    _, wheel = build(sources(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("dist"))
    return install(wheel, tmp_path_factory.mktemp("installed"))


@pytest.mark.timeout(1800)
def test_a_newcomer_gets_an_answer_shows_it_and_asks_a_question_of_their_own(run: Installation) -> None:
    assert run("ngpt-campaign", "new", "quickstart").stdout == "quickstart.yaml\n"
    campaign = ["quickstart.yaml", "--smoke", "--set", "steps=6", "eval_every=3"]
    planned = answer(run, *campaign, "--plan")
    assert sorted(path.name for path in run.work.iterdir()) == ["quickstart.yaml"]

    summary = answer(run, *campaign)
    results = Path("results") / NAME
    trials = records(run.work / results)
    assert summary["status"] == "finished" and summary["command"].startswith("ngpt-campaign quickstart.yaml ")
    assert len(trials) == summary["trials"]["finished"] > 0 and planned["trials"] >= len(trials)
    assert {trial["provenance"]["device"] for trial in trials} and all(
        trial["status"] == "finished" for trial in trials
    )
    before = (run.work / results / "journal.jsonl").read_bytes()
    assert answer(run, *campaign)["trials"] == summary["trials"]  # resumes, and trains nothing
    assert (
        len(records(run.work / results)) == len(trials)
        and before in (run.work / results / "journal.jsonl").read_bytes()
    )

    assert summary["environment"]["ngpt_campaign"] == own_version() and summary["environment"]["git_commit"] is None
    assert f"| ngpt campaign | {own_version()} |" in (run.work / results / "report.md").read_text(encoding="utf-8")

    look(run, summary)
    read_in_python(run, results, trials)
    own_rule(run)
    compare(run, campaign, results)
    if not CAN_BROWSE:
        pytest.skip("all but the browser: it needs `pip install 'ngpt-campaign[browser]'` and Chromium")


def records(results: Path) -> list[dict[str, Any]]:
    lines = [line for path in sorted(results.glob("*/trials.jsonl")) for line in path.read_text("utf-8").splitlines()]
    return [json.loads(line) for line in lines]


def look(run: Installation, summary: dict[str, Any]) -> None:
    """Opens the results folder in a browser, from the list of campaigns to the report of one."""
    with run.start("ngpt-campaign", "serve", "--json") as server:
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            with urllib.request.urlopen(url, timeout=60) as page:
                assert f'id="row-{NAME}"' in page.read().decode()
            if CAN_BROWSE:
                browse(url, summary)
        finally:
            server.send_signal(signal.SIGINT)
            _, err = server.communicate(timeout=60)
    assert server.returncode == 130 and "Traceback" not in err


def browse(url: str, summary: dict[str, Any]) -> None:
    """Clicks from the list of campaigns to the report of one, which draws its charts."""
    from playwright import sync_api as playwright

    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        row = page.inner_text(f"#row-{NAME}")
        assert "finished" in row and str(summary["trials"]["finished"]) in row
        page.click(f"text={NAME}")
        page.wait_for_url(f"**/{NAME}/")
        page.wait_for_selector(".js-plotly-plot")
        text = page.inner_text("body")
        assert "SMOKE" in text and all(phase["phase"] in text for phase in summary["phases"])
        browser.close()
    assert complaints == []


def read_in_python(run: Installation, results: Path, trials: list[dict[str, Any]]) -> None:
    """Reads the results in a script: the numbers are those of the records."""
    (run.work / "read.py").write_text(SCRIPT, encoding="utf-8")
    done = run("python", "read.py", results)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["trials"] == len(trials) and found["arms"] >= len({trial["phase"] for trial in trials})
    assert found["val_loss"] == {trial["trial_id"]: trial["metrics"]["val_loss"] for trial in trials}
    assert found["last"] == [6]


def own_rule(run: Installation) -> None:
    """Asks whether a residual rule of one's own is better, in a file and without editing the package."""
    (run.work / "rule.py").write_text(RULE, encoding="utf-8")
    (run.work / "mine.yaml").write_text(QUESTION, encoding="utf-8")
    refused = run("ngpt-campaign", "mine.yaml")
    assert refused.returncode == 2 and "add_unit" in refused.stderr
    summary = answer(run, "mine.yaml", "--plugin", "rule.py")
    (arm,) = [arm for arm in summary["phases"][0]["arms"] if arm["overrides"]]
    assert "add_unit" in arm["arm"] and arm["n"] == 2
    losses = {
        (trial["arm"], trial["seed"]): trial["metrics"]["val_loss"] for trial in records(run.work / "results/mine")
    }
    assert len(losses) == len(set(losses.values())) == 4


def compare(run: Installation, campaign: list[str], results: Path) -> None:
    """Repeats the campaign with another learning rate, and compares the two."""
    other = ["lr=0.001", "--inline", "--out", "other"]
    assert answer(run, *campaign, *other)["status"] == "finished"
    compared = run("ngpt-campaign", "compare", results, Path("other") / NAME)
    assert compared.returncode == 0 and re.search(r"optim\.lr|\blr\b", compared.stdout), compared.stderr
    verified = run("ngpt-campaign", "verify", results)
    assert verified.returncode == 0, verified.stdout + verified.stderr
