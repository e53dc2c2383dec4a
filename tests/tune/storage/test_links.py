"""A run writes through no link that somebody else may have planted; a user's own link to a larger disk works."""

import os
from pathlib import Path

import pytest

import run_campaign
from tests.helpers.tiny_campaign import write_file
from tune.campaign import load_campaign
from tune.planning.plan import preview
from tune.storage.links import refuse_links

ALPHA = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=ALPHA)


def content(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("place", ["{}", "{}/checkpoints", "{}/metrics.jsonl", "{}/heartbeat"])
def test_a_run_refuses_a_link_in_the_place_of_a_trial_or_of_what_is_in_it(
    place: str, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = next(trial.trial_id for phase in preview(load_campaign(file)) for trial in phase.trials)
    target, link = tmp_path / "target", tmp_path / "results" / "tiny" / "trials" / place.format(trial)
    target.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(target if "." not in link.name else target / "file")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "results")]) == 74
    assert capsys.readouterr().err == f"{link}: it is a link, and a run would write to its target\n"
    assert content(target) == [] and not (tmp_path / "results" / "tiny" / "journal.jsonl").exists()


@pytest.mark.parametrize("place", ["results", "results/tiny", "results/tiny/trials"])
def test_a_link_of_ones_own_to_another_disk_works(place: str, file: Path, tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / place
    disk.mkdir()
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(disk)
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "results")]) == 0
    assert link.is_symlink() and len(list(disk.rglob("model.safetensors"))) >= 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link to another user")
@pytest.mark.parametrize("place", ["tiny", "tiny/trials"])
def test_a_link_of_another_user_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "disk")
    refuse_links(tmp_path / "tiny")
    os.lchown(link, 12345, 12345)
    with pytest.raises(OSError, match="it belongs to another user"):
        refuse_links(tmp_path / "tiny")
