"""A file that has changed since its first start: unchanged trials are kept, changes of their meaning are refused."""

from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import PHASES, begun, drive, losses, records, session_on, strict, write_file
from tune.planning.changes import FLAG, Changes, check_changes, find_changes
from tune.session.session import Session
from tune.storage.journal import read_journal

pytestmark = pytest.mark.usefixtures("no_report")

ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "results" / "tiny"


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=ONE_PHASE)


def finish(file: Path, root: Path) -> None:
    """Results of four trials without training: two arms with two seeds."""
    with session_on(file, root) as session:
        drive(begun(session))
        session.end()


def changes(file: Path, root: Path, *assignments: str) -> Changes:
    with session_on(file, root, assignments) as session:
        return find_changes(session.campaign, session.state)


def edit(file: Path, before: str, after: str) -> None:
    """Replaces `before` where it is in the file: a list of seeds everywhere, anything else in its first place."""
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, -1 if before == "seeds: [1, 2]" else 1))


def test_a_directory_without_results_has_no_changes(file: Path, root: Path) -> None:
    assert changes(file, root) == Changes()
    with session_on(file, root) as session:
        begun(session)
    assert changes(file, root, "steps=3", "eval_tokens=256") == Changes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("campaign: tiny", "# a comment\ncampaign: tiny"),
        ("  batch_size: 4\n  steps: 6\n", "  steps: 6\n  batch_size: 4\n"),
        ("  optim: {lr: 1e-2}", "  optim.lr: 0.01"),
        ("workers: 2", "workers: 1"),
        ("log_every: 1", "log_every: 2"),
        ("[0.05, 0.4]", "[0.4, 0.05]"),
    ],
)
def test_settings_that_decide_nothing_are_not_changes(file: Path, root: Path, before: str, after: str) -> None:
    finish(file, root)
    edit(file, before, after)
    found = changes(file, root)
    assert (found.lines(), found.kept, found.new) == ([], 4, 0)


@pytest.mark.parametrize("after", ["seeds: [2]", "seeds: [2, 3]", "seeds: [3, 4]"])
def test_results_of_seeds_that_the_phase_gives_up_are_not_said_to_be_retrained(
    file: Path, root: Path, after: str
) -> None:
    finish(file, root)
    edit(file, "seeds: [1, 2]", after)
    found = changes(file, root)
    n = "2 results" if "2" not in after else "1 result"
    assert (found.changed, found.gone) == ((), ())
    assert f"not used, since the phase has other seeds now: alpha/alpha=0.4 ({n})" in found.lines()


def test_added_arms_and_seeds_are_new_trials_and_the_others_are_kept(file: Path, root: Path) -> None:
    finish(file, root)
    edit(file, "[0.05, 0.4]", "[0.05, 0.4, 0.2]")
    edit(file, "seeds: [1, 2]", "seeds: [1, 2, 3]")
    found = changes(file, root)
    assert (found.kept, found.new, found.meaning, found.changed, found.gone) == (4, 5, (), (), ())
    with session_on(file, root) as session:
        assert len(drive(begun(session))) == 5


def test_an_added_seed_does_not_report_later_phases_as_trained_anew(tmp_path: Path, corpus: Path) -> None:
    phases = PHASES.replace("[0.05, 0.4]", "[0.05, 0.2, 0.4]")
    file, root = write_file(tmp_path, corpus, phases=phases), tmp_path / "results" / "tiny"
    finish(file, root)
    edit(file, "seeds: [1, 2]", "seeds: [1, 2, 3]")
    found = changes(file, root)
    assert (found.lines(), found.kept, found.new) == ([], 8, 4)
    with session_on(file, root) as session:
        assert len(drive(begun(session))) == 4


def test_trials_of_a_phase_that_still_waits_for_a_winner_are_not_new(tmp_path: Path, corpus: Path) -> None:
    file, root = write_file(tmp_path, corpus), tmp_path / "results" / "tiny"
    with session_on(file, root) as session:
        drive(begun(session), most=2)
    edit(file, "[0.05, 0.4]", "[0.05, 0.4, 0.2]")
    found = changes(file, root)
    assert (found.kept, found.new) == (2, 2)  # the added arm with two seeds, and nothing of `projection`
    file.write_text(file.read_text() + "  - name: third\n    vary: {alpha: [0.05, 0.3]}\n")
    assert changes(file, root).new == 4


def test_rules_that_choose_another_winner_leave_trials_to_train(tmp_path: Path, corpus: Path) -> None:
    file, root = write_file(tmp_path, corpus), tmp_path / "results" / "tiny"
    finish(file, root)
    edit(file, "seeds:", "min_effect: 3\nseeds:")
    with session_on(file, root) as session:
        assert find_changes(session.campaign, session.state).new == 2
        assert session.has_work()
        assert len(drive(begun(session))) == 2


def test_a_removed_arm_is_listed_and_stays_in_the_journal(file: Path, root: Path) -> None:
    finish(file, root)
    edit(file, "[0.05, 0.4]", "[0.05, 0.3]")
    found = changes(file, root)
    assert (found.kept, found.new, found.gone) == (2, 2, ("alpha/alpha=0.4 (2 results)",))
    assert found.lines() == [
        "2 results are kept, 2 trials are new",
        "no longer part of the campaign: alpha/alpha=0.4 (2 results)",
    ]
    check_changes(found, allowed=False)  # no reason to refuse
    with session_on(file, root) as session:
        drive(begun(session))
        session.end()
        assert len(session.state.results) == 6


def test_a_changed_base_setting_trains_the_same_arms_anew(file: Path, root: Path) -> None:
    finish(file, root)
    found = changes(file, root, "optim.lr=0.02")
    assert found.settings == ("optim.lr: 0.01 -> 0.02",) and found.meaning == ()
    assert (found.kept, found.new) == (0, 4)
    assert found.changed == ("alpha/alpha=0.05 (2 results)", "alpha/alpha=0.4 (2 results)")
    check_changes(found, allowed=False)


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("seeds:", "metric: {name: val_bpb}\nseeds:", "metric.name: val_loss -> val_bpb"),
        ("seeds:", "metric: {goal: maximize}\nseeds:", "metric.goal: minimize -> maximize"),
        ("seeds:", "confidence: 0.8\nseeds:", "confidence: 0.95 -> 0.8"),
        ("seeds:", "min_effect: 0\nseeds:", "min_effect: 0.005 -> 0"),
        ("seeds:", "hold: steps\nseeds:", "hold.alpha: tokens -> steps"),
        ("eval_tokens: 128", "eval_tokens: 64", "eval_tokens: 128 -> 64"),
    ],
)
def test_a_change_of_the_meaning_of_results_is_refused_unless_it_is_allowed(
    file: Path, root: Path, before: str, after: str, line: str
) -> None:
    finish(file, root)
    edit(file, before, after)
    found = changes(file, root)
    assert found.meaning == (line,)
    with pytest.raises(ConfigError) as caught:
        check_changes(found, allowed=False)
    assert f"  {line}\n" in str(caught.value) and FLAG in str(caught.value)
    check_changes(found, allowed=True)


def test_different_data_change_the_meaning_and_moved_data_do_not(
    file: Path, root: Path, corpus: Path, tmp_path: Path
) -> None:
    finish(file, root)
    (tmp_path / "elsewhere").mkdir()
    copy, other = tmp_path / "elsewhere" / corpus.name, tmp_path / "elsewhere" / "other.txt"
    copy.write_bytes(corpus.read_bytes())
    other.write_text(corpus.read_text()[:40_000])
    assert changes(file, root, f"data.corpus={copy}").lines() == []
    (line,) = changes(file, root, f"data.corpus={other}").meaning
    assert line.startswith(f"data: {corpus} by sentencepiece:400 (") and f"-> {other} by" in line
    (line,) = changes(file, root, "data.tokenizer=sentencepiece:300").meaning
    assert "by sentencepiece:400 (" in line and "by sentencepiece:300 (" in line
    assert len(changes(file, root, "data.val_fraction=0.2").meaning) == 1


def test_a_journal_of_an_older_version_is_compared_by_the_fields_it_has(file: Path, root: Path) -> None:
    finish(file, root)
    with session_on(file, root) as session:
        for name in ("hold", "min_effect"):
            del session.state.campaign[name]
        del session.state.campaign["base"]["project_every"]
        assert find_changes(session.campaign, session.state).lines() == []


def test_a_long_list_of_arms_is_cut() -> None:
    arms = tuple(f"alpha/{i}" for i in range(20))
    lines = Changes(gone=arms).lines()
    assert len(lines) == 10 and lines[-1] == "no longer part of the campaign: 12 more arms"


def test_the_command_refuses_before_anything_is_written_and_continues_when_allowed(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, root = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1]"), tmp_path / "r" / "tiny"
    command = [str(file), "--inline", "--json", "--out", str(tmp_path / "r")]
    assert run_campaign.main(command) == 0
    before, trained = (root / "journal.jsonl").read_bytes(), losses(root)
    edit(file, "seeds:", "metric: {name: val_bpb}\nseeds:")
    edit(file, "[0.05, 0.4]", "[0.05, 0.2]")
    capsys.readouterr()
    assert run_campaign.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "  metric.name: val_loss -> val_bpb\n" in printed.err
    assert (root / "journal.jsonl").read_bytes() == before

    assert run_campaign.main([*command, FLAG]) == 0
    printed = capsys.readouterr()
    assert strict(printed.out)["metric"]["name"] == "val_bpb"
    assert "1 result is kept, 1 trial is new" in printed.err
    assert "no longer part of the campaign: alpha/alpha=0.4 (1 result)" in printed.err
    (kept,) = {key for key in losses(root) if key in trained}
    assert losses(root)[kept] == trained[kept] and len(records(root)) == 2
    starts = [event for event in read_journal(root / "journal.jsonl") if event["event"] == "trial_started"]
    assert len(starts) == 3

    assert run_campaign.main(command) == 0  # the change was allowed before
    assert "changed since" not in capsys.readouterr().err


def test_a_session_journals_how_its_arms_are_compared(file: Path, root: Path) -> None:
    finish(file, root)
    session: Session
    with session_on(file, root) as session:
        assert session.state.campaign["hold"] == {"alpha": "tokens"}
