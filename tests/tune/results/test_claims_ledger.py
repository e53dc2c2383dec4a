"""Claims of several campaigns on one page: each once, and with what it rests on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, strict, write_file
from tune.claims.reader import load_claims
from tune.claims.relations import RELATIONS
from tune.results.claims_ledger import Ledger, collect, common_verdict, ledger_markdown, question, total
from tune.spec.schema import Claim
from tune.storage.journal import read_journal
from tune.storage.summaries import to_json

PHASES = """
  - name: alpha
    vary: {alpha: [0.05, 0.2, 0.4]}
claims:
  - {id: longer, source: "002", says: "0.4 beats 0.05", left: {alpha: 0.4}, right: {alpha: 0.05}, relation: less}
  - {id: best, says: "[red]0.2[/] is | best", left: {alpha: 0.2}, relation: best, phase: alpha}
  - {id: tokens, source: "001", says: "18B tokens", relation: arithmetic, value: 18e9, tolerance: 1e9,
     expression: 110e3 * 20 * 60}
"""
OTHERS = """
claims:
  - {id: falls, source: "003", relation: monotone, setting: alpha, direction: decreasing}
  - {id: wide, source: "003", says: "wider is better", relation: less, left: {n_embd: 512}, right: {n_embd: 256}}
"""


@pytest.fixture
def run(tmp_path: Path, corpus: Path, no_report: None):
    """Runs a campaign whose trials cost nothing, under a name of its own; returns its results directory."""

    def results(name: str, *, gain: float = 1.0, seeds: str = "[1, 2, 3]") -> Path:
        file = write_file(tmp_path, corpus, phases=PHASES, seeds=seeds)
        file.write_text(file.read_text().replace("campaign: tiny", f"campaign: {name}"))
        with session_on(file, tmp_path / name) as session:
            drive(begun(session), lambda spec: pretend(spec, gain=gain))
            session.end()
        return tmp_path / name

    return results


def verdicts(ledger: Ledger) -> dict[str, str]:
    return {entry.id: entry.verdict for entry in ledger.claims}


def test_claims_stand_by_source_and_each_counts_once(run: Any) -> None:
    ledger = collect([run("one"), run("two")])
    assert verdicts(ledger) == {"tokens": "refuted", "longer": "reproduced", "best": "refuted"}  # by source, then none
    assert total(ledger) == "3 claims: 1 reproduced, 2 refuted, 0 undecided, 0 no data"
    assert [[found.campaign for found in entry.found] for entry in ledger.claims] == [["one", "two"]] * 3
    page = ledger_markdown(ledger)
    headings = [line for line in page.splitlines() if line.startswith("#")]
    sources = ["## Source 001", "## Source 002", "## Without a source"]
    assert headings == ["# Claims", "## The campaigns", *sources, "## How to read this"]
    assert page.count("| longer | 0.4 beats 0.05 | val\\_loss: ") <= 1 and page.count("| longer |") == 1
    assert page.count("| tokens |") == 1 and page.count("110e3") == 2, "a sum is the same in every campaign"
    assert strict(json.dumps(to_json(ledger), allow_nan=False)) == to_json(ledger)


def test_a_claim_shows_what_each_campaign_observed_and_the_trials_that_it_rests_on(run: Any) -> None:
    root = run("one")
    (entry,) = [entry for entry in collect([root]).claims if entry.id == "longer"]
    (found,) = entry.found
    losses = {e["trial_id"]: e["metrics"]["val_loss"] for e in read_journal(root / "journal.jsonl") if "metrics" in e}
    arms = [[losses[trial] for trial in found.trials[i : i + 3]] for i in (0, 3)]
    assert found.observed == pytest.approx((sum(arms[0]) - sum(arms[1])) / 3, abs=1e-12)
    assert found.ci_low < found.observed < found.ci_high and found.n == 3
    page = ledger_markdown(collect([root]))
    for trial in found.trials:
        assert f"{trial[:6]} (seeds 1, 2, 3)" in page and (root / "journal.jsonl").read_text().count(trial) > 1
    assert "\\[red\\]0.2\\[/\\] is \\| best" in page


def test_a_campaign_says_on_what_it_was_run_and_how_to_repeat_it(run: Any) -> None:
    root = run("one")
    (about,) = collect([root]).campaigns
    start = next(e for e in read_journal(root / "journal.jsonl") if e["event"] == "campaign_started")
    assert (about["campaign"], about["device"]) == ("one", start["environment"]["device"])
    assert (about["command"], about["seeds"], about["trials"]) == ("the same command", [1, 2, 3], 9)
    assert (about["n_params"], about["steps"], about["tokens"]) == ([1000, 1000], [6, 6], [384, 384])
    assert about["dates"] == ["2026-11-21", "2026-11-21"]
    page = ledger_markdown(collect([root]), command="python run_campaign.py claims one")
    row = next(line for line in page.splitlines() if line.startswith("| one |"))
    for fact in ("1.00k", "| 6 |", "384", "1, 2 and 3", "2026-11-21", "tokens"):
        assert fact in row
    assert f"the same command    # {root}" in page and "`python run_campaign.py claims one`" in page


def test_another_file_is_held_against_the_same_trials(run: Any, tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(OTHERS)
    ledger = collect([run("one")], load_claims(tmp_path / "claims.yaml"))
    assert verdicts(ledger) == {"falls": "reproduced", "wide": "no data"}
    page = ledger_markdown(ledger)
    assert "- **wide**: no arm so far is n_embd=512." in page.replace("\\", "")
    row = "| wide | wider is better | val_loss: n_embd=512 below n_embd=256 | no data | - | - | - |"
    assert row.replace(" - ", " \N{EN DASH} ") in page


def test_campaigns_that_disagree_leave_a_claim_undecided_and_both_are_shown(run: Any) -> None:
    ledger = collect([run("one"), run("two", gain=-1.0), run("three", seeds="[1]")])
    (longer,) = [entry for entry in ledger.claims if entry.id == "longer"]
    assert [found.verdict for found in longer.found] == ["reproduced", "refuted", "undecided"]
    assert longer.verdict == "undecided"
    page = ledger_markdown(ledger)
    assert "The campaigns disagree, so it is undecided." in page
    rows = [line for line in page.splitlines() if line.startswith(("| longer |", "| ″ |"))][:3]
    assert [line.split(" | ")[-1].rstrip(" |") for line in rows] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("several", "together"),
    [
        (["reproduced", "undecided", "no data"], "reproduced"),
        (["no data", "refuted"], "refuted"),
        (["refuted", "reproduced"], "undecided"),
        (["no data", "undecided"], "undecided"),
        (["no data", "no data"], "no data"),
    ],
)
def test_those_that_can_decide_do(several: Sequence[str], together: str) -> None:
    assert common_verdict(several) == common_verdict(several[::-1]) == together


def test_a_campaign_that_was_run_twice_is_told_apart_by_its_folder(run: Any, tmp_path: Path) -> None:
    first = run("one")
    run("one").rename(tmp_path / "again")
    second = run("one")
    again = tmp_path / "again"
    names = [about["campaign"] for about in collect([second, again, Path(f"{first}/")]).campaigns]
    assert names == ["one", f"one in {again}"], "a folder that is named twice counts once"


def test_every_relation_can_be_told_in_words() -> None:
    fields: dict[str, Any] = {"value": 1.5, "tolerance": 0.1, "expression": "1 + 1", "setting": "model.alpha"}
    sides: dict[str, Any] = {"left": {"model.alpha": 0.4}, "right": {"arm": "baseline"}, "direction": "decreasing"}
    sides["parts"] = ({"arm": "a"}, {"arm": "b"})
    told = {relation: question(Claim("x", relation, **fields, **sides)) for relation in RELATIONS}
    assert told == {
        "less": "val_loss: alpha=0.4 below the arm baseline",
        "greater": "val_loss: alpha=0.4 above the arm baseline",
        "equal": "val_loss: alpha=0.4 within 0.1 of the arm baseline",
        "ratio": "val_loss: alpha=0.4 over the arm baseline is 1.5 ± 0.1",
        "below": "val_loss: alpha=0.4 below 1.5",
        "above": "val_loss: alpha=0.4 above 1.5",
        "synergy": "val_loss: alpha=0.4 gains more than the sum of the arm a and the arm b",
        "best": "val_loss: alpha=0.4 is the best of its phase",
        "monotone": "val_loss: decreasing along alpha",
        "arithmetic": "1 + 1 is 1.5 ± 0.1",
    }


# ---- from the command line -----------------------------------------------------------------------------------------


def test_the_verb_prints_the_page_or_writes_it(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = [str(run("one")), str(run("two"))]
    assert run_campaign.main(["claims", *roots]) == 0
    printed = capsys.readouterr().out
    assert run_campaign.main(["claims", *roots, "--out", str(tmp_path / "docs" / "claims.md")]) == 0
    written = capsys.readouterr()
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert page.replace(f" --out {tmp_path / 'docs' / 'claims.md'}", "") == printed and written.out == ""
    assert "3 claims: 1 reproduced, 2 refuted" in written.err
    assert run_campaign.main(["claims", *roots, "--json"]) == 0
    assert strict(capsys.readouterr().out) == to_json(collect([Path(root) for root in roots]))


def test_a_report_with_claims_of_another_file_has_them_in_every_file(
    run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run("one")
    monkeypatch.undo()  # the report is written here
    (tmp_path / "claims.yaml").write_text(OTHERS)
    assert run_campaign.main(["report", str(root), "--claims", str(tmp_path / "claims.yaml")]) == 0
    assert "**2 claims: 1 reproduced, 0 refuted, 0 undecided, 1 no data.**" in capsys.readouterr().out
    claims = strict((root / "summary.json").read_text())["claims"]
    assert {claim["id"]: claim["verdict"] for claim in claims} == {"falls": "reproduced", "wide": "no data"}
    assert "wider is better" in (root / "report.md").read_text()
    assert "wider is better" in (root / "report.html").read_text()
    assert run_campaign.main(["report", str(root)]) == 0
    claims = strict((root / "summary.json").read_text())["claims"]
    assert [claim["id"] for claim in claims] == ["longer", "best", "tokens"], "and its own again"


def test_without_any_claim_the_user_is_told_what_to_give(tmp_path: Path, corpus: Path, no_report: None) -> None:
    with session_on(write_file(tmp_path, corpus), tmp_path / "tiny") as session:
        drive(begun(session))
        session.end()
    with pytest.raises(ConfigError, match=r"no claims in .*tiny; give a file that has some with --claims FILE"):
        collect([tmp_path / "tiny"])
    (tmp_path / "none.yaml").write_text("campaign: x\n")
    with pytest.raises(ConfigError, match=r"none.yaml:1:1: claims: expected a list of claims"):
        load_claims(tmp_path / "none.yaml")
