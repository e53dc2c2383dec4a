"""A formula is edited between two runs of a campaign: the command line stops, trains anew, or keeps and says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ngpt.code.digest import Code
from tests.chaos.invariants import facts
from tests.chaos.operations import Fault, Watch, read_log
from tests.chaos.world import Ran, World, clear, world
from tests.helpers import ROOT
from tests.helpers.tiny_campaign import records, write_file
from tune.results.verify import verify
from tune.session import session
from tune.storage.journal import read_journal
from tune.trials import trial

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


@pytest.mark.slow
@pytest.mark.timeout(900)  # five runs of the command line, each of which imports torch
def test_an_edited_formula_stops_the_run_until_it_is_retrained_or_kept(checkout: Checkout) -> None:
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


# ---- killed on the way ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EditedWorld(World):
    """A world whose runs believe that the formula of `lerp` was edited, and get `--retrain`."""

    code: Code | None = None

    def command(self, out: Path, *options: str) -> list[str]:
        return [*super().command(out, *options), "--retrain"]

    def inside(self, out: Path, fault: Fault | None) -> Callable[[], None]:
        """What a run does first: it takes the other code for its own, and hits the fault."""

        def prepare() -> None:
            for module in (session, trial):
                module.current_code = lambda: self.code  # type: ignore[assignment]
            if fault is not None:
                Watch(out, out.with_suffix(".log"), fault).install()

        return prepare


def retrained(made: EditedWorld, out: Path, fault: Fault | None) -> Ran:
    """Copies the results of the first code to `out` and runs there."""
    shutil.copytree(made.reference, out / "tiny")
    return made.run(out, made.inside(out, fault))


def killed_everywhere(every: int) -> Iterator[tuple[int, list[str]]]:
    """Kills the run that trains anew before each `every`-th operation, runs again, and yields what is wrong then."""
    with world(phases="\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n") as plain:
        package = plain.folder / "copy" / "ngpt"
        shutil.copytree(ROOT / "ngpt", package, ignore=shutil.ignore_patterns("__pycache__"))
        rule = package / "model" / "residual.py"
        rule.write_text(rule.read_text().replace("norm(x + alpha * (f - x))", "norm(x + 2 * alpha * (f - x))"))
        made = EditedWorld(plain.folder, plain.file, plain.every, plain.reference, Code(package))
        undisturbed, out = facts(made.reference), made.folder / "again"  # the formula only looks edited
        never = Fault("kill", -1)
        assert retrained(made, out, never).code == 0
        operations = read_log(out.with_suffix(".log"))
        assert any("discarded" in operation.to for operation in operations)
        clear(out)
        for at in range(0, len(operations), every):
            ran = retrained(made, out, Fault("kill", at))
            again = made.run(out, made.inside(out, None))
            broken = [] if ran.code == -signal.SIGKILL else [f"the first run ended with {ran.code}"]
            broken += [] if again.code == 0 else [f"the second run ended with {again.code}: {again.err}"]
            found, root = facts(out / "tiny"), out / "tiny"
            broken += [
                name
                for name in ("records", "phases", "rows", "weights")
                if getattr(found, name) != getattr(undisturbed, name)
            ]
            broken += [issue.path for issue in verify(root).problems]
            broken += [] if len(list((root / "discarded").iterdir())) == 2 else ["the old files are not in `discarded`"]
            yield at, [f"{operations[at].kind} {operations[at].path}: {text}" for text in broken]
            clear(out)


@pytest.mark.slow
def test_a_kill_while_trials_are_trained_anew_changes_no_result() -> None:
    tried = dict(killed_everywhere(every=67))
    assert len(tried) >= 2 and [broken for broken in tried.values() if broken] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_kills_throughout_a_run_that_trains_anew_change_no_result() -> None:
    tried = dict(killed_everywhere(every=4))  # `every=1`, five minutes, has passed too
    assert len(tried) > 40 and [broken for broken in tried.values() if broken] == []
