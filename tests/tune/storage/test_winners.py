"""A phase that starts from the winner of another results directory."""

from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.planning.plan import preview
from tune.storage.journal import Journal
from tune.storage.winners import read_inherited_winner

SECOND = """
  - name: more
    inherit: PATH
    vary: {project_every: [3]}
  - name: check
    seeds: [8, 9]
    runs: [{arm: winner, inherit: PATH}]
"""


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def first(tmp_path: Path, corpus: Path) -> Path:
    """A finished campaign; alpha=0.4 has won its phase `alpha`, and project_every=1 the next one's, as the baseline."""
    root = tmp_path / "results" / "first"
    with session_on(write_file(tmp_path, corpus), root) as session:
        drive(begun(session))
        session.end()
    return root


def second(folder: Path, corpus: Path, path: object) -> Path:
    (folder / "second").mkdir(exist_ok=True)
    return write_file(folder / "second", corpus, phases=SECOND.replace("PATH", str(path)))


def test_the_winner_of_another_directory_becomes_the_base_and_is_in_the_manifest(
    first: Path, tmp_path: Path, corpus: Path
) -> None:
    root, path = tmp_path / "results" / "second", first / "alpha"
    with session_on(second(tmp_path, corpus, path), root) as session:
        given_out = drive(begun(session))
        session.end()
        assert session.is_over()
    assert {spec.config.model.alpha for spec in given_out if spec.phase == "more"} == {0.4}
    assert strict((root / "more/summary.json").read_text())["base"] == {"model.alpha": 0.4}
    arms = {spec.arm: spec.config.model.alpha for spec in given_out if spec.phase == "check"}
    assert arms["winner"] == 0.4 != arms["baseline"]
    inherited = strict((root / "manifest.json").read_text())["inherited"][str(path)]
    assert (inherited["campaign"], inherited["phase"], inherited["winner"]) == ("tiny", "alpha", "alpha=0.4")
    assert inherited["overrides"] == {"model.alpha": 0.4}
    with session_on(second(tmp_path, corpus, path), root) as session:
        assert drive(begun(session)) == []


def test_a_path_is_relative_to_the_working_directory(
    first: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    phase = preview(load_campaign(second(tmp_path, corpus, "results/first/projection")))[0]
    assert phase.inherit == "results/first/projection"
    assert phase.base == {"model.alpha": 0.4, "project_every": 1}


def refusal(folder: Path, corpus: Path, path: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_campaign(second(folder, corpus, path))
    return str(caught.value).splitlines()[0]


def test_what_is_not_there_is_one_message_with_its_place(first: Path, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ":17:5: phases[0].inherit: there is no results directory" in refusal(tmp_path, corpus, "nowhere/alpha")
    assert "is not a results directory: it has no journal.jsonl" in refusal(tmp_path, corpus, tmp_path / "empty/alpha")
    assert "unknown phase 'alhpa', did you mean 'alpha'?" in refusal(tmp_path, corpus, first / "alhpa")


def test_an_address_is_refused_in_one_line(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_campaign(second(tmp_path, corpus, "s3://bucket/runs/first/alpha"))
    text = "'s3://bucket/runs/first/alpha' is an address, and inherit reads a results directory here; copy its journal"
    assert all(text in line for line in str(refused.value).splitlines())


def test_a_phase_without_a_winner_cannot_be_inherited(tmp_path: Path, corpus: Path) -> None:
    root = tmp_path / "half"
    with session_on(write_file(tmp_path, corpus), root) as session:
        drive(begun(session), pretend, most=2)
    assert "phase 'alpha' of" in refusal(tmp_path, corpus, root / "alpha")
    assert "has no winner yet" in refusal(tmp_path, corpus, root / "alpha")


def test_a_winner_with_unknown_settings_and_a_damaged_journal_are_refused(first: Path, tmp_path: Path) -> None:
    journal = Journal(first / "journal.jsonl")
    old = {"phase": "alpha", "winner": "x", "winner_overrides": {"model.gone": 1}, "why": ""}
    journal.append("phase_finished", **old)
    journal.close()
    with pytest.raises(ConfigError, match=r"settings that this version does not have: model\.gone"):
        read_inherited_winner(str(first / "alpha"))
    text = (first / "journal.jsonl").read_text()
    (first / "journal.jsonl").write_text(text.replace("campaign_started", "campaign_startled", 1))
    with pytest.raises(ConfigError, match="does not match its CRC"):
        read_inherited_winner(str(first / "alpha"))


def test_a_winner_that_does_not_fit_this_base_is_refused_when_the_file_is_read(tmp_path: Path, corpus: Path) -> None:
    root = tmp_path / "wide"
    heads = "\n  - name: heads\n    vary: {n_head: [4]}\n"
    with session_on(write_file(tmp_path, corpus, phases=heads), root) as session:
        drive(begun(session), lambda spec: pretend(spec, gain=0.0) if spec.config.model.n_head == 2 else better(spec))
        session.end()
    file = second(tmp_path, corpus, root / "heads")
    file.write_text(file.read_text().replace("n_embd: 16", "n_embd: 24").replace("n_head: 2", "n_head: 1"))
    load_campaign(file)
    file.write_text(file.read_text().replace("n_embd: 24", "n_embd: 18"))
    with pytest.raises(ConfigError, match="n_embd 18 cannot be divided into n_head 4 heads"):
        load_campaign(file)


def better(spec):
    """A result that is far below that of any other arm."""
    result = pretend(spec, gain=0.0)
    loss = result.metrics["val_loss"] or 0.0
    result.metrics["val_loss"] = loss - 3.0
    return result
