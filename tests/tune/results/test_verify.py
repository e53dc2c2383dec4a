"""A directory that was not touched is intact; whatever is damaged in it is named, with what can be done about it."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import train_all, write_file
from tune.results.summary import rebuild, sealed
from tune.results.verify import Issue, verify, verify_text


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
