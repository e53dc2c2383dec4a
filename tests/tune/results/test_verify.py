"""A directory that was not touched is intact; whatever is damaged in it is named, with what can be done about it."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers.forged_journal import write_forged
from tests.helpers.other_user import read_only_copy
from tests.helpers.tiny_campaign import begun, drive, session_on, train_all, write_file
from tune import load_results
from tune.results.summary import rebuild, sealed
from tune.results.verify import Issue, verify, verify_text
from tune.storage.journal import read_journal
from tune.storage.links import NOT_FOLLOWED


@pytest.fixture(autouse=True)
def fast(request: pytest.FixtureRequest) -> None:
    """The report takes a second; one test makes it."""
    if "with_report" not in request.fixturenames:
        request.getfixturevalue("no_report")


@pytest.fixture
def with_report() -> None:
    """A test that takes it makes reports."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A campaign of four trials that has ended."""
    root = tmp_path_factory.mktemp("results") / "tiny"
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        train_all(write_file(root.parent, corpus, phases=phases), root)
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "tiny"))


def trial(root: Path) -> Path:
    return min((root / "trials").iterdir())


def newest(root: Path) -> Path:
    return max((trial(root) / "checkpoints").iterdir())


def flip(path: Path, at: int | None = None) -> None:
    """Changes one bit, in the middle where nothing else is said."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def problems(root: Path) -> dict[str, Issue]:
    found = verify(root)
    assert found.intact == (not found.problems)
    return {finding.path: finding for finding in found.problems}


def test_a_finished_campaign_is_intact_and_all_of_it_was_checked(finished: Path) -> None:
    found = verify(finished)
    assert found.problems == found.notes == [] and found.intact
    events = len((finished / "journal.jsonl").read_text().splitlines())
    trials = len(list((finished / "trials").iterdir()))
    checkpoints = len(list(finished.glob("trials/*/checkpoints/step_*")))
    assert found.checked == {"events": events, "trials": trials, "checkpoints": checkpoints, "derived": 5}
    assert trials == 4 and checkpoints == 8


def test_to_look_changes_nothing(root: Path) -> None:
    def content() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}

    flip(root / "alpha" / "summary.json")
    before = content()
    verify(root)
    assert content() == before


DAMAGE: dict[str, tuple[Callable[[Path], Path], str, str | None]] = {
    "a bit of the journal": (lambda root: root / "journal.jsonl", "does not match its CRC", "backup"),
    "a bit of the manifest": (lambda root: root / "manifest.json", "", "command again"),
    "a bit of the campaign's file": (
        lambda root: root / "campaign.yaml",
        "differs from the campaign file",
        "command again",
    ),
    "a bit of a trial's settings": (
        lambda root: trial(root) / "config.json",
        "",
        "journal record has the correct settings",
    ),
    "a bit of a model": (
        lambda root: newest(root) / "model.safetensors",
        "model.safetensors",
        "the previous checkpoint",
    ),
    "a bit of the moments": (lambda root: newest(root) / "state.pt", "state.pt", "the previous checkpoint"),
    "a bit of a checkpoint's manifest": (lambda root: newest(root) / "MANIFEST.json", "", "the previous checkpoint"),
    "a bit of the records": (lambda root: root / "alpha" / "trials.jsonl", "matches neither the journal", "report"),
    "a bit of a phase's summary": (
        lambda root: root / "alpha" / "summary.json",
        "matches neither the journal",
        "report",
    ),
    "a bit of the arms": (lambda root: root / "alpha" / "summary.parquet", "", "report"),
    "a bit of the curves": (lambda root: root / "alpha" / "curves.parquet", "", "report"),
    "a bit of the digests": (lambda root: root / "derived.json", "", "report"),
    "a bit of the summary": (lambda root: root / "summary.json", "matches neither the journal", "report"),
}


def place(root: Path, path: Path) -> str:
    """Where a finding about a file is: a checkpoint is one thing."""
    return str((path.parent if path.parent.name.startswith("step_") else path).relative_to(root))


@pytest.mark.parametrize("kind", DAMAGE)
def test_one_flipped_bit_is_found_and_named(kind: str, root: Path) -> None:
    where, text, remedy = DAMAGE[kind]
    path = where(root)
    flip(path)
    found = problems(root)
    name = next(name for name in found if name.partition(":")[0] == place(root, path))
    assert text in found[name].text and (remedy or "") in (found[name].remedy or "")
    assert len(found) == 1


@pytest.mark.parametrize("kind", [kind for kind in DAMAGE if "journal" not in kind])
def test_a_missing_file_is_found_and_named(kind: str, root: Path) -> None:
    path = DAMAGE[kind][0](root)
    path.unlink()
    found = problems(root)
    assert list(found) == [place(root, path)]
    if path.parent.name != "checkpoints" and "step_" not in path.parent.name:
        assert "No such file" in found[place(root, path)].text


def test_what_report_rebuilds_is_intact_again(root: Path) -> None:
    for kind, (where, _, remedy) in DAMAGE.items():
        if remedy == "report":
            flip(where(root)) if "arms" in kind else where(root).unlink()
    assert len(problems(root)) == 6
    rebuild(root)
    assert problems(root) == {}


def test_what_another_version_wrote_is_a_note_and_no_problem(root: Path) -> None:
    """Its digest is that of the file, and the journal gives another one now."""
    change(root / "alpha" / "summary.json", '"phase"', '"Phase"')
    digests = json.loads((root / "derived.json").read_text())
    del digests["sha256"]
    digests["alpha/summary.json"] = hashlib.sha256((root / "alpha" / "summary.json").read_bytes()).hexdigest()
    (root / "derived.json").write_text(json.dumps(sealed(digests)))
    found = verify(root)
    assert found.intact
    (note,) = found.notes
    assert note.path == "alpha/summary.json" and "by another version" in note.text


def test_the_report_is_held_against_the_one_that_the_journal_gives(root: Path, with_report: None) -> None:
    rebuild(root)
    flip(root / "report.html")
    (root / "report.md").unlink()
    found = problems(root)
    assert list(found) == ["report.html", "report.md"]
    assert "matches neither the journal" in found["report.html"].text and "rebuilds" in found["report.md"].remedy
    rebuild(root)
    assert problems(root) == {}


def test_a_curve_that_was_changed_is_found(root: Path) -> None:
    path = trial(root) / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["train_loss"] += 1e-9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = str(path.relative_to(root))
    assert "has changed since the campaign ended" in problems(root)[name].text
    last = next(row for row in reversed(rows) if "val_loss" in row)
    last["val_loss"] += 1e-9
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "its last validation loss differs from the journal record" in problems(root)[name].text


@pytest.mark.parametrize("row", ['{"step": 3, "train_loss": NaN}\n', '{"step": 3, "train', "[1]\n", "\xff\n"])
def test_rows_that_are_no_rows_are_found(row: str, root: Path) -> None:
    path = trial(root) / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(row.encode("latin-1"))
    assert str(path.relative_to(root)) in problems(root)


def test_a_trial_that_is_gone_is_found_once(root: Path) -> None:
    gone = trial(root)
    shutil.rmtree(gone)
    found = problems(root)
    assert "the folder is missing" in found[f"trials/{gone.name}"].text
    assert list(found) == [f"trials/{gone.name}"]


def test_settings_of_another_trial_are_found(root: Path) -> None:
    one, other = sorted((root / "trials").iterdir())[:2]
    shutil.copy(other / "config.json", one / "config.json")
    assert list(problems(root)) == [f"trials/{one.name}/config.json"]


def test_a_finished_trial_without_an_intact_checkpoint_is_found(root: Path) -> None:
    for folder in (trial(root) / "checkpoints").iterdir():
        flip(folder / "model.safetensors")
    found = problems(root)
    assert "its result stands, its model is lost" in found[f"trials/{trial(root).name}/checkpoints"].text
    assert len(found) == 3


def test_a_checkpoint_under_another_name_is_found(root: Path) -> None:
    path = newest(root)
    path.rename(path.with_name("step_0000007"))
    text = next(iter(problems(root).values())).text
    assert text == "its manifest says step 6"


def test_every_damaged_line_of_the_journal_is_named(root: Path) -> None:
    path = root / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{}\n", *lines[3:5], lines[5].replace(b'"event"', b'"evemt"'), *lines[6:]]))
    assert list(problems(root)) == ["journal.jsonl:3", "journal.jsonl:6"]
    path.write_bytes(b"".join([*lines[:3], *lines[4:]]))
    assert "has number 5, not 4" in problems(root)["journal.jsonl:4"].text


def test_what_a_crash_leaves_is_a_note_and_no_problem(root: Path) -> None:
    with (root / "journal.jsonl").open("a") as file:
        file.write('{"seq": 99, "ti')
    (trial(root) / "checkpoints" / ".tmp-0123").mkdir()
    (trial(root) / "checkpoints" / "damaged-step_0000003-abcdef").mkdir()
    (root / "alpha" / ".summary.json.0123.tmp").write_text("{")
    (root / "trials" / "0123456789-s1").mkdir()
    found = verify(root)
    assert found.intact
    noted = {note.path.rpartition("/")[2] for note in found.notes}
    assert noted == {
        "journal.jsonl",
        ".tmp-0123",
        "damaged-step_0000003-abcdef",
        ".summary.json.0123.tmp",
        "0123456789-s1",
    }


def test_a_campaign_that_was_killed_is_intact(root: Path) -> None:
    """Its last events, and the files that are written at the end, are not there."""
    path = root / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if '"phase_finished"' in line)
    path.write_text("".join(lines[: at + 1]))
    (root / "summary.json").unlink()
    found = verify(root)
    assert found.problems == [] and found.checked["derived"] == 4


def test_a_place_without_a_campaign_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a results directory: it has no journal\.jsonl"):
        verify(tmp_path)


def test_the_text_has_each_problem_with_its_remedy_and_a_last_line(root: Path) -> None:
    flip(root / "alpha" / "summary.json")
    first, second, last = verify_text(verify(root)).splitlines()
    assert first.startswith("problem  alpha/summary.json: ") and "report rebuilds it" in second
    assert last.startswith(f"{root}: 1 problem; checked ") and "8 checkpoints" in last


def test_the_command_says_it_by_its_exit_code_and_as_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_campaign.main(["verify", str(root)]) == 0
    assert "intact" in capsys.readouterr().out
    (root / "alpha" / "trials.jsonl").unlink()
    assert run_campaign.main(["verify", str(root), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [problem["path"] for problem in found["problems"]] == ["alpha/trials.jsonl"] and not found["intact"]
    assert run_campaign.main(["verify", str(root / "alpha")]) == 2


def test_a_result_that_no_arm_has_any_more_is_named_here_and_in_the_summary(tmp_path: Path, corpus: Path) -> None:
    phases = "\n  - name: after\n    vary: {project_every: [3]}\n"
    root = tmp_path / "r"
    train_all(write_file(tmp_path, corpus, phases=phases), root)
    assert verify(root).notes == []
    summary = train_all(write_file(tmp_path, corpus, phases=phases.replace("3", "4")), root)
    findings = verify(root)
    assert findings.intact
    text = "no summary shows this trial, and 1 more of the same arm: the campaign has no arm 'project_every=3' of phase"
    assert [note.text.startswith(text) for note in findings.notes] == [True]
    assert summary.warnings == (
        "the journal has results that no arm of this campaign uses: 2 trials of after/project_every=3; "
        "`verify` lists them",
    )


# ---- results of somebody else ----------------------------------------------------------------------------------------


def test_looking_at_results_needs_no_right_to_write(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = Path(tempfile.mkdtemp()) / "claims.yaml"  # the folders of pytest are closed to other users
    claim.parent.chmod(0o755)
    claim.write_text("claims:\n  - {id: a, relation: less, left: {alpha: 0.4}, right: {alpha: 0.05}}\n")

    def codes(results: Path) -> dict[str, int]:
        commands = {"status": [], "verify": [], "compare": [str(results)], "claims": ["--claims", str(claim)]}
        return {verb: run_campaign.main([verb, str(results), *more]) for verb, more in commands.items()}

    expected = dict.fromkeys(("status", "verify", "compare", "claims"), 0)
    assert codes(root) == expected
    with read_only_copy(root) as copy:
        assert not os.access(copy, os.W_OK, effective_ids=True)
        assert codes(copy) == expected
    shutil.rmtree(claim.parent)


PIPES = (
    *("campaign.lock", "campaign.yaml", "manifest.json", "derived.json", "alpha/summary.json", "alpha/curves.parquet"),
    *("trials/*/config.json", "trials/*/metrics.jsonl", "trials/*/checkpoints/*/MANIFEST.json"),
    "trials/*/checkpoints/*/model.safetensors",
)


@pytest.mark.parametrize("name", PIPES)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, root: Path) -> None:
    path = min(root.glob(name))
    path.unlink()
    os.mkfifo(path)
    found = problems(root)
    assert name == "campaign.lock" or any("not a regular file" in issue.text for issue in found.values())


@pytest.mark.parametrize("name", ["manifest.json", "derived.json", "trials/*/config.json", "trials/*/metrics.jsonl"])
def test_json_that_is_nested_too_deeply_is_a_problem(name: str, root: Path) -> None:
    path = min(root.glob(name))
    path.write_text("[" * 200_000 + "\n")
    assert str(path.relative_to(root)) in problems(root)


@pytest.mark.parametrize("files", [{"/dev/zero": {}}, {"../../config.json": {}}, ["model.safetensors"]])
def test_a_checkpoint_that_names_files_elsewhere_is_a_problem(files: Any, root: Path) -> None:
    path = newest(root) / "MANIFEST.json"
    manifest = json.loads(path.read_text()) | {"files": files}
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1))
    text = problems(root)[str(newest(root).relative_to(root))].text
    assert "names a file of another folder" in text or "not as it was written" in text


def forge(root: Path, event: str, **fields: Any) -> int:
    """Changes fields of the first such event, with right CRCs; returns its line number."""
    events = read_journal(root / "journal.jsonl")
    changed = next(one for one in events if one["event"] == event)
    changed |= fields
    write_forged(root / "journal.jsonl", events)
    return changed["seq"]


@pytest.mark.parametrize("name", ["/abs/path", "../../../x", "../other/alpha", "derived.json"])
def test_a_phase_that_leads_elsewhere_is_refused_by_every_command(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = forge(root, "phase_planned", phase=name)
    before = {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()}
    for command in (["status"], ["report"], ["compare", str(root)], ["claims"]):
        assert run_campaign.main([command[0], str(root), *command[1:]]) == 74
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{root}/journal.jsonl:{number}: ") and "cannot be a folder of the results" in line
    assert run_campaign.main(["verify", str(root)]) == 1
    assert "cannot be a folder of the results" in problems(root)[f"journal.jsonl:{number}"].text
    assert {path: path.read_bytes() for path in root.parent.rglob("*") if path.is_file()} == before


def test_an_event_that_does_not_fit_is_a_problem(root: Path) -> None:
    number = forge(root, "phase_finished", winner="nobody")
    assert "does not fit those before it" in problems(root)[f"journal.jsonl:{number}"].text


def test_a_link_in_the_place_of_a_phase_is_not_followed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(root / "alpha")
    (root / "alpha").symlink_to(tmp_path / "elsewhere")
    victim = tmp_path / "bashrc"
    victim.write_text("mine\n")
    (root / "summary.json").unlink()
    (root / "summary.json").symlink_to(victim)
    assert run_campaign.main(["report", str(root)]) == 74
    assert "it is a link, and a phase is only written inside the results directory" in capsys.readouterr().err
    (root / "alpha").unlink()
    assert run_campaign.main(["report", str(root)]) == 0
    assert list((tmp_path / "elsewhere").iterdir()) == [] and victim.read_text() == "mine\n"


@pytest.mark.parametrize("place", [".", "metrics.jsonl", "checkpoints"])
def test_a_link_in_the_place_of_a_trial_is_reported_and_nothing_behind_it_is_read(
    place: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link, aside = trial(root) / place, tmp_path / "elsewhere"
    link.rename(aside)
    link.symlink_to(aside)  # what is there is right, so that nothing but the link can be wrong
    name = str(link.relative_to(root))
    assert problems(root) == {name: Issue(name, NOT_FOLLOWED)}
    for verb in (["report"], ["status"]):
        assert run_campaign.main([*verb, str(root)]) == 74
        assert capsys.readouterr().err == f"{link}: {NOT_FOLLOWED}\n"
    with pytest.raises(OSError, match="it is a link"):
        load_results(root)
    assert not (root / "report.html").exists()


# ---- what is gone, and what is old -----------------------------------------------------------------------------------


def test_report_warns_of_a_trial_that_is_gone_and_of_damaged_lines(root: Path) -> None:
    shutil.rmtree(trial(root))
    other = trial(root)
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": \n')
    gone, damaged = rebuild(root).warnings
    assert "their folders are gone" in gone and "--retrain trains them anew" in gone
    assert damaged.startswith(f"trials/{other.name}/metrics.jsonl: they have damaged lines")
    assert set(problems(root)) == {issue for issue in problems(root) if issue.startswith("trials/")}


def test_the_files_of_a_phase_that_was_renamed_are_set_aside(tmp_path: Path, corpus: Path) -> None:
    phases = "\n  - name: before\n    vary: {alpha: [0.4]}\n"
    root = tmp_path / "r"
    train_all(write_file(tmp_path, corpus, phases=phases, seeds="[1]"), root)
    (root / "mine").mkdir()
    with session_on(
        write_file(tmp_path, corpus, phases=phases.replace("before", "after"), seeds="[1]"), root
    ) as session:
        drive(begun(session))
        session.message = (lines := list[str]()).append
        session.end()
    (aside,) = (root / "discarded").iterdir()
    assert aside.name.startswith("before-") and (aside / "summary.json").is_file()
    assert lines == [f"the campaign has no phase before any more; its files are in discarded/{aside.name}"]
    assert [path.parent.name for path in root.glob("*/summary.parquet")] == ["after"]
    assert (root / "mine").is_dir() and verify(root).problems == verify(root).notes == []
    (root / "before").mkdir()  # as an older version left it
    (note,) = verify(root).notes
    assert (
        note.path == "before" and "no phase of this name any more" in note.text and "discarded/" in (note.remedy or "")
    )


def test_values_of_a_curve_that_do_not_fit_their_column_are_left_out(root: Path) -> None:
    path = trial(root) / "metrics.jsonl"
    wrong = {"tokens": 1.5, "val_loss": "5", "val_bpb": True, "lr": 1e308, "grad_norm": 10**400, "r_mean": [1.0]}
    path.write_text(json.dumps({"step": 1, "train_loss": 4.5, **wrong}) + "\n")
    rebuild(root)
    rows = parquet.read_table(root / "alpha" / "curves.parquet").to_pylist()
    (row,) = (row for row in rows if row["trial_id"] == path.parent.name)
    assert row["train_loss"] == 4.5 and all(row[name] is None for name in wrong)
