"""The kept results in docs/measured can be recomputed from their journals, and docs/claims.md says what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tune.results.claims_ledger import collect, ledger_markdown
from tune.results.summary import rebuild
from tune.storage.journal import read_journal
from tune.storage.summaries import to_json

ROOT = Path(__file__).parents[3]
KEPT = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("docs/measured/*/journal.jsonl"))


def arms(summary: Any) -> list[dict[str, Any]]:
    """The arms of all phases without what only the trials' folders know."""
    names = ("arm", "rank", "n", "verdict", "decision", "trial_ids")
    return [{name: arm[name] for name in names} for phase in summary["phases"] for arm in phase["arms"]]


def numbers(summary: Any) -> list[float]:
    found = []
    for arm in (arm for phase in summary["phases"] for arm in phase["arms"]):
        for part in (arm["score"], arm["delta"] or {}):
            found += [value for _, value in sorted(part.items()) if isinstance(value, int | float)]
    return found


@pytest.mark.parametrize("folder", KEPT, ids=str)
def test_kept_summaries_follow_from_the_values_of_each_seed(folder: Path, tmp_path: Path, no_report: None) -> None:
    shutil.copy(ROOT / folder / "journal.jsonl", tmp_path)
    again = json.loads(json.dumps(to_json(rebuild(tmp_path))))
    kept = json.loads((ROOT / folder / "summary.json").read_text())
    assert arms(again) == arms(kept)
    assert numbers(again) == pytest.approx(numbers(kept), rel=1e-6, abs=1e-9)
    assert again["answer"]["sentence"] == kept["answer"]["sentence"]


@pytest.mark.parametrize("folder", KEPT, ids=str)
def test_kept_results_come_from_a_clean_commit_and_have_a_value_for_each_seed(folder: Path) -> None:
    events = read_journal(ROOT / folder / "journal.jsonl")
    environments = [event["environment"] for event in events if "environment" in event]
    assert environments and not any(environment["git_dirty"] for environment in environments)
    assert all(environment["git_commit"] for environment in environments)


def test_the_page_of_claims_follows_from_the_kept_journals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert KEPT
    command = " ".join(["python run_campaign.py claims", *map(str, KEPT), "--out docs/claims.md"])
    assert ledger_markdown(collect(KEPT), command=command) == (ROOT / "docs/claims.md").read_text()
