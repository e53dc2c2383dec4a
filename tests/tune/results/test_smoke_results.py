"""Results of `--smoke` say so wherever they are shown, and answer nothing."""

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from ngpt.system.atomic_files import write_atomic
from tests.helpers.tiny_campaign import begun, drive, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.machine import environment
from tune.planning.smoke import shrink_campaign
from tune.results.claims_ledger import collect
from tune.results.status import read_snapshot
from tune.results.summary import rebuild
from tune.session.datasets import describe_data
from tune.session.session import Session
from tune.storage.journal import Journal, read_journal
from tune.terminal.final_screen import final_screen
from tune.terminal.live import live_view

CLAIMS = """
claims:
  - {id: longer, source: "002", says: "0.4 beats 0.05", relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}
"""


@pytest.fixture
def smoked(tmp_path: Path, corpus: Path) -> Path:
    """The results of a smoke run whose arms differ clearly."""
    file = write_file(tmp_path, corpus)
    write_atomic(file, file.read_text() + CLAIMS)
    campaign = shrink_campaign(load_campaign(file))
    root = tmp_path / "tiny-smoke"
    with Session(campaign, root, command="c", environment=environment.describe("cpu")) as session:
        session.begin(describe_data(campaign.base))
        drive(session)
        session.end()
    return root


def shown(view: object) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(view)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_every_view_says_smoke_and_none_gives_advice(smoked: Path) -> None:
    summary = rebuild(smoked)
    assert strict((smoked / "summary.json").read_text())["smoke"] is True
    page = (smoked / "report.html").read_text()
    assert "<title>SMOKE tiny: report</title>" in page and "<h1>SMOKE: " in page
    texts = [page, (smoked / "report.md").read_text(), shown(final_screen(summary, report=smoked / "report.html"))]
    assert texts[1].startswith("# SMOKE tiny\n\n**SMOKE: ")
    assert "SMOKE tiny" in texts[2]
    for text in texts:
        assert "run the same command without" in " ".join(text.replace("│", " ").split())
        assert not any(word in text for word in ("Use alpha", "Confirm it", "keep the base", "needs about"))
    assert shown(live_view(read_snapshot(smoked))).startswith("SMOKE tiny")
    assert all(phase.why.startswith("SMOKE: ") for phase in summary.phases)


def test_a_smoke_run_decides_no_claim(smoked: Path) -> None:
    (claim,) = rebuild(smoked).claims
    assert (claim.verdict, claim.why) == ("no data", "SMOKE: a tiny model and a few steps decide no claim")
    ledger = collect([smoked])
    assert (ledger.claims[0].verdict, ledger.campaigns[0]["campaign"]) == ("no data", "SMOKE tiny")


def test_an_older_journal_is_known_by_its_command(smoked: Path) -> None:
    events = read_journal(smoked / "journal.jsonl")
    write_atomic(smoked / "journal.jsonl", "")
    old = Journal(smoked / "journal.jsonl")
    for event in events:
        fields = {name: value for name, value in event.items() if name not in ("seq", "time", "event", "smoke")}
        if "command" in fields:
            fields["command"] = "python run_campaign.py x.yaml --smoke"
        old.append(event["event"], **fields)
    old.close()
    assert rebuild(smoked).smoke


def test_other_results_are_not_marked(tmp_path: Path, corpus: Path) -> None:
    with session_on(write_file(tmp_path, corpus), tmp_path / "r") as session:
        drive(begun(session))
        summary = session.end()
    assert not summary.smoke and replace(summary, smoke=True).title == "SMOKE tiny"
    assert summary.answer.sentence.startswith("Use ")
