"""A formula is edited between two runs of a campaign: the command line stops, trains anew, or keeps and says so."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.tiny_campaign import records, write_file
from tune.results.verify import verify
from tune.storage.journal import read_journal

RULES = "\n  - name: rule\n    vary: {residual: [slerp, lerp]}\n"
FORMULA = "torch.cos(alpha * angle) * x"


@dataclass
class Checkout:
    """A copy of the sources that a test edits, with a campaign of four trials."""

    folder: Path
    file: Path

    @property
    def rule(self) -> Path:
        return self.folder / "ngpt" / "model" / "residual.py"

    @property
    def results(self) -> Path:
        return self.folder / "results" / "tiny"

    def edit(self, before: str, after: str) -> None:
        text = self.rule.read_text()
        assert text.count(before) == 1
        self.rule.write_text(text.replace(before, after))

    def command(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "run_campaign.py", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "200"}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    def run(self, *options: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = self.command(self.file, "--inline", *options)
        assert done.returncode == code, done.stderr
        return done

    def losses(self, arm: str) -> list[float]:
        return [record["metrics"]["val_loss"] for record in records(self.results) if record["arm"] == arm]

    def rows(self, trial_id: str) -> list[int]:
        lines = (self.results / "trials" / trial_id / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def checkout(tmp_path: Path, corpus: Path) -> Checkout:
    for name in ("ngpt", "tune"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_campaign.py", tmp_path)
    return Checkout(tmp_path, write_file(tmp_path, corpus, phases=RULES))


@pytest.mark.timeout(900)  # five runs of the command line, each of which imports torch
def test_an_edited_formula_between_two_runs(checkout: Checkout) -> None:
    """One story: a comment and a move, a formula, `--retrain`, another formula, `--keep`."""
    checkout.run()
    lerp, slerp = checkout.losses("residual=lerp"), checkout.losses("residual=slerp")
    steps = {record["trial_id"]: checkout.rows(record["trial_id"]) for record in records(checkout.results)}

    checkout.edit("Rotates x by a fraction", "Turns x by a fraction")
    text = checkout.rule.read_text()
    start, end = text.index("def slerp("), text.index("def add_normalize(")
    rest = text[end:].replace("\n\nRESIDUAL_RULES", f"\n\n{text[start:end].rstrip()}\n\n\nRESIDUAL_RULES", 1)
    checkout.rule.write_text(text[:start] + rest)  # moved behind the other rules
    assert " seed " not in checkout.run().stderr

    checkout.edit(FORMULA, f"1.01 * {FORMULA}")
    stopped = checkout.run(code=2)
    assert "ngpt/model/residual.py (slerp): 2 results of rule/residual=slerp" in stopped.stderr
    assert "Traceback" not in stopped.stderr and stopped.stdout == ""

    assert checkout.run("--retrain").stderr.count("rule  residual=slerp seed") == 2
    new = checkout.losses("residual=slerp")
    assert checkout.losses("residual=lerp") == lerp and not set(new) & set(slerp)
    assert {trial_id: checkout.rows(trial_id) for trial_id in steps} == steps  # rows of one run each
    finished = [event for event in read_journal(checkout.results / "journal.jsonl") if "metrics" in event]
    assert set(slerp) < {event["metrics"]["val_loss"] for event in finished}  # the journal keeps the old numbers
    assert verify(checkout.results).intact

    checkout.edit(f"1.01 * {FORMULA}", f"1.02 * {FORMULA}")
    kept = checkout.run("--keep")
    mark = "2 of its 4 trials were trained by other code than that of the newest run, and kept: ngpt/model/residual.py"
    assert mark in " ".join(kept.stdout.split()) and checkout.losses("residual=slerp") == new
    assert mark in (checkout.results / "report.html").read_text()
    assert mark in (checkout.results / "summary.json").read_text()
    assert verify(checkout.results).intact
