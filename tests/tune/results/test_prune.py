"""Pruning frees what finished trials no longer need, and every promise still holds: results, weights, resuming."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import run_campaign
from ngpt.train import main as train
from ngpt.training.load_model import load_model
from tests.helpers.forged_journal import write_forged
from tests.helpers.tiny_campaign import train_all, write_file
from tune.results.prune import prune
from tune.results.verify import verify
from tune.storage.journal import read_journal
from tune.storage.lock import ResultsLock

pytestmark = pytest.mark.usefixtures("no_report")
PHASES = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with a campaign of four trials that has ended, and its file."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.write_report", lambda *_: None)
        train_all(write_file(folder, corpus, phases=PHASES), folder / "tiny")
    return folder


@pytest.fixture
def root(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy")) / "tiny"


def content(root: Path, pattern: str = "*") -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob(pattern) if path.is_file()}


def used(root: Path) -> int:
    return sum(map(len, content(root).values()))


def states(root: Path) -> set[str]:
    """The trials with optimizer state."""
    return {path.parents[2].name for path in root.glob("trials/*/checkpoints/*/state.pt")}


def forge_status(root: Path, status: str) -> str:
    """Gives the last trial of the journal another status; returns its id."""
    events = read_journal(root / "journal.jsonl")
    event = [event for event in events if event["event"] == "trial_finished"][-1]
    event["status"] = status
    write_forged(root / "journal.jsonl", events)
    return event["trial_id"]


def test_it_frees_the_optimizer_state_and_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, size = content(root), used(root)
    moments = sum(len(data) for name, data in before.items() if name.endswith("/state.pt"))
    assert run_campaign.main(["prune", str(root), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["bytes"] == moments == size - used(root) and done["finished_trials"] == 4
    assert done["kinds"]["optimizer states"] == {"number": 8, "bytes": moments}
    kept = {name: data for name, data in before.items() if not name.endswith("/state.pt")}
    lost = {name for name, data in kept.items() if content(root).get(name) != data}
    assert lost == set()
    found = verify(root)
    assert found.problems == [] and [note.text for note in found.notes] == [
        "the optimizer state of 8 checkpoints of finished trials was pruned; their weights are whole"
    ]
    assert run_campaign.main(["prune", str(root)]) == 0
    assert capsys.readouterr().out == f"{root}: nothing to free; 4 finished trials: all weights kept\n"


def test_the_campaign_uses_its_results_and_models_as_before(root: Path, finished: Path) -> None:
    prune(root)
    before = json.loads((root / "summary.json").read_text())
    summary = train_all(root.parent / "tiny.yaml", root)
    assert [arm.score.mean for arm in summary.phases[0].arms] == [
        arm["score"]["mean"] for arm in before["phases"][0]["arms"]
    ]
    starts = [event for event in read_journal(root / "journal.jsonl") if event["event"] == "trial_started"]
    assert len(starts) == 4, "nothing is trained again"
    trial = min((root / "trials").iterdir())
    whole = load_model(finished / "tiny" / "trials" / trial.name, best=True)
    assert load_model(trial, best=True).checkpoint.weights_sha256 == whole.checkpoint.weights_sha256


def test_an_unfinished_trial_keeps_everything_and_resumes_to_the_same_numbers(root: Path) -> None:
    records = root / "alpha" / "trials.jsonl"
    before_scores = [json.loads(line)["metrics"]["val_loss"] for line in records.read_text().splitlines()]
    events = read_journal(root / "journal.jsonl")
    last = max(index for index, event in enumerate(events) if event["event"] == "trial_finished")
    write_forged(root / "journal.jsonl", events[:last])  # as if killed before this event
    trial_id = events[last]["trial_id"]
    folder = root / "trials" / trial_id / "checkpoints"
    shutil.rmtree(max(folder.iterdir()))  # at step 3 of 6
    before = content(folder)
    assert prune(root).other_trials == 1
    assert states(root) == {trial_id} and content(folder) == before
    train_all(root.parent / "tiny.yaml", root)
    scores = [json.loads(line)["metrics"]["val_loss"] for line in records.read_text().splitlines()]
    assert scores == before_scores
    assert verify(root).problems == []


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_trial_that_may_still_continue_keeps_its_optimizer_state(status: str, root: Path) -> None:
    trial_id = forge_status(root, status)
    prune(root)
    assert states(root) == {trial_id}


def test_a_kill_at_any_moment_leaves_what_verify_accepts(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = 0

    def run_killed_at(number: int, copy: Path) -> bool:
        """Prunes until the disk operation of this number; returns whether that was before the end."""
        calls = iter(range(number))

        def killing(real: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: object, **named: object) -> None:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                real(*arguments, **named)

            return call

        with monkeypatch.context() as patch:
            for name in ("unlink", "fsync"):
                patch.setattr(os, name, killing(getattr(os, name)))
            patch.setattr(Path, "touch", killing(Path.touch))
            try:
                prune(copy)
            except KeyboardInterrupt:
                return True
        return False

    for trial in sorted((root / "trials").iterdir())[1:]:
        shutil.rmtree(trial)
    missing = len(verify(root).problems)  # the folders of three trials
    while run_killed_at(killed, copy := Path(shutil.copytree(root, tmp_path / str(killed)))):
        found = verify(copy)
        assert len(found.problems) == missing, (killed, found.problems)
        prune(copy)
        assert states(copy) == set() and len(verify(copy).problems) == missing, killed
        killed += 1
    assert killed > 10


def test_a_dry_run_says_the_same_and_changes_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leftover = min((root / "trials").iterdir()) / "checkpoints" / ".tmp-0123"
    leftover.mkdir()
    (leftover / "state.pt").write_bytes(bytes(2000))
    before = content(root)
    assert run_campaign.main(["prune", str(root), "--dry-run"]) == 0
    would = capsys.readouterr().out
    assert content(root) == before and "     2 kB  1 unfinished checkpoint\n" in would
    assert run_campaign.main(["prune", str(root)]) == 0
    assert capsys.readouterr().out == would.replace("would free", "freed") and not leftover.exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_it_refuses_while_the_campaign_runs(more: list[str], root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ResultsLock(root):
        assert run_campaign.main(["prune", str(root), *more]) == 3
    assert "is in use by another run" in capsys.readouterr().err and len(states(root)) == 4


def test_places_that_cannot_be_pruned_are_one_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    for place, text in {
        str(root / "empty"): "is not a results directory",
        "s3://bucket/tiny": "prune works on a local results directory, not on an address",
    }.items():
        assert run_campaign.main(["prune", place]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert text in line
    assert list((root / "empty").iterdir()) == []
    with (root / "journal.jsonl").open("r+b") as file:
        file.write(b"X")
    assert run_campaign.main(["prune", str(root)]) == 74 and len(states(root)) == 4


def test_links_and_damaged_checkpoints_are_left_as_they_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As somebody else may have planted them, so that files elsewhere are removed."""
    mine = Path(shutil.copytree(root, tmp_path / "mine"))
    before = content(mine)
    folders = sorted(root.glob("trials/*/checkpoints/step_*"))
    (folders[0] / "state.pt").unlink()
    (folders[0] / "state.pt").symlink_to(next(mine.rglob("state.pt")))
    shutil.rmtree(folders[1])
    folders[1].symlink_to(next(mine.glob("trials/*/checkpoints/step_*")))
    (folders[2] / "state.pt.pruned").symlink_to(mine / "new")
    (folders[3] / "model.safetensors").write_bytes(b"short")
    (folders[4] / "MANIFEST.json").write_text("{}")
    (folders[0].parent / ".tmp-1").symlink_to(mine)
    reasons = [skipped.text for skipped in prune(root).skipped]
    assert reasons == [
        "state.pt is not a regular file",
        "it is a link",
        "state.pt.pruned is not a regular file",
        "model.safetensors is not as long as its manifest says",
        "its manifest is damaged",
    ]
    assert all((folder / "state.pt").exists() for folder in folders[2:5]) and content(mine) == before
    shutil.rmtree(folders[7].parent)
    folders[7].parent.symlink_to(min(mine.glob("trials/*/checkpoints")))
    assert run_campaign.main(["prune", str(root)]) == 74
    assert "it is a link" in capsys.readouterr().err and content(mine) == before


def test_to_continue_from_a_pruned_checkpoint_is_refused_with_advice(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(root)
    trial, out = min((root / "trials").iterdir()), tmp_path / "more"
    assert train(["--resume", str(trial), "--out", str(out), "--set", "steps=9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    newest = max((trial / "checkpoints").iterdir())
    assert line == (
        f"{newest}: its optimizer state was pruned, so no run can continue from it; "
        f"to train its weights further, start a new run with --init-from {newest}"
    )
    assert not (out / "checkpoints").exists()


def test_verify_names_a_pruned_trial_that_the_journal_does_not_hold_as_finished(root: Path) -> None:
    prune(root)
    trial_id = forge_status(root, "stopped")
    problems = {issue.path: issue for issue in verify(root).problems}
    found = [issue for path, issue in problems.items() if path.startswith(f"trials/{trial_id}/checkpoints/")]
    assert len(found) == 2 and all("cannot continue from it" in issue.text for issue in found)


def test_a_full_disk_is_freed(root: Path, tmp_path: Path) -> None:
    """It needs no space for itself: neither for its lock nor for its marks."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        full = Path(shutil.copytree(root, disk / "tiny"))
        with pytest.raises(OSError) as error, (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert error.value.errno == errno.ENOSPC
        assert prune(full).bytes > 0 and states(full) == set()
        assert verify(full).problems == []
    finally:
        subprocess.run(["umount", disk], check=True)
