"""Results of somebody else: whatever a journal with right CRCs says, a command reads it, or refuses it in one line.

Nothing is written outside the results directory, only `report` and `prune` write inside it, nothing hangs, nothing
ends in a traceback.
"""

import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

import run_campaign
from ngpt.config.base import UserError
from tests.helpers.forged_journal import forged, write_forged
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune.campaign_pages import CampaignPages
from tune.launch import check_results
from tune.storage.journal import read_journal

PHASES = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
  - name: rounds
    inherit: alpha
    seeds: {until: decided, start: 2, most: 4}
    vary: {project_every: [3]}
  - name: lr
    search: {method: random, trials: 2, space: {lr: {log: [1e-3, 1e-1]}}}
claims:
  - {id: less, relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}
  - {id: ratio, relation: ratio, left: {alpha: 0.4}, right: {alpha: 0.05}, value: 1, tolerance: 0.1}
  - {id: monotone, relation: monotone, setting: alpha, direction: decreasing}
  - {id: sum, relation: arithmetic, expression: "2 * 3", value: 6, tolerance: 0}
"""
READING = ("status", "verify", "compare", "claims")
MISTAKE_CODES = (0, 2, 74)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A finished campaign whose trials were not trained, with files of one of them."""
    folder = tmp_path_factory.mktemp("original")
    file = write_file(folder, corpus, phases=PHASES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        with session_on(file, folder / "tiny") as session:
            given = drive(begun(session), lambda spec: pretend(spec, gain=5.0))
            session.end()
    trial = folder / "tiny" / "trials" / given[0].trial_id
    trial.mkdir(parents=True)
    (trial / "metrics.jsonl").write_text('{"step": 3, "tokens": 192, "val_loss": 5.0}\n')
    return folder


def contents(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name not in ("campaign.lock",)
    }


def attack(original: Path, folder: Path, random: Random, capsys: pytest.CaptureFixture[str]) -> None:
    """Reads one forged journal by every command."""
    shutil.copytree(original, folder)
    file, root, sound = folder / "tiny.yaml", folder / "tiny", original / "tiny"
    events, done = forged(read_journal(sound / "journal.jsonl"), random)
    write_forged(root / "journal.jsonl", events)
    before = contents(folder)
    commands = [[verb, str(root)] for verb in READING] + [[str(file), "--plan", "--out", str(folder), "--keep"]]
    commands.append(["prune", str(root), "--dry-run"])
    for command in commands:
        more = [str(sound)] if command[0] == "compare" else []
        code = run_campaign.main([*command, *more, *random.choice(([], ["--json"]))])
        printed = capsys.readouterr()
        assert code in ((0, 1, 2, 74) if command[0] == "verify" else MISTAKE_CODES), (command, done, printed.err)
        assert "Traceback" not in printed.err and len(printed.err) < 20_000, (command, done, printed.err)
        assert code in (0, 1) or printed.err.strip(), (command, done)
        assert contents(folder) == before, (command, done)
    pages = CampaignPages(folder)
    for path in ("/", "/tiny/", "/tiny/state"):
        page = pages(path)
        assert page is not None and page.status == 200, (path, done)
    assert capsys.readouterr().err == "" and contents(folder) == before, done
    for verb in ("report", "prune"):
        code, printed = run_campaign.main([verb, str(root)]), capsys.readouterr()
        assert code in MISTAKE_CODES and "Traceback" not in printed.err, (verb, done, printed.err)
    outside = {name: content for name, content in contents(folder).items() if not name.startswith("tiny/")}
    assert outside == {name: content for name, content in before.items() if not name.startswith("tiny/")}, done
    try:
        with session_on(file, root) as session:
            check_results(session, keep=True, allow_change=True)
    except (UserError, OSError) as error:
        assert str(error), done
    shutil.rmtree(folder)


@pytest.mark.usefixtures("no_report")
def test_a_forged_journal_is_read_or_refused_in_one_line(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(10):
        attack(original, tmp_path / str(seed), Random(seed), capsys)


@pytest.mark.slow
def test_many_forged_journals_are_read_or_refused_in_one_line(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(1000, 1150):
        attack(original, tmp_path / str(seed), Random(seed), capsys)
