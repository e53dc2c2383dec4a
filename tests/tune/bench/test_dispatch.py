"""Fake workers that ask the real session for trials."""

import math
from pathlib import Path

import pytest

from tune.bench import dispatch as module
from tune.bench.dispatch import dispatch
from tune.storage.journal import read_journal


@pytest.mark.slow
def test_every_trial_is_handed_out_once_and_all_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    real = module.read_snapshot

    def look(root: Path) -> object:
        found.extend(event["trial_id"] for event in read_journal(root / "journal.jsonl") if "metrics" in event)
        return real(root)

    monkeypatch.setattr(module, "read_snapshot", look)
    figures = dispatch(trials=80, workers=8, phases=2)
    assert figures["trials"] == len(found) == len({*found}) >= 80
    assert all(math.isfinite(value) and value > 0 for value in figures.values())
