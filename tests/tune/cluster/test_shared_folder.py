"""Whether another host shares a folder; a process of this host stands in for it, and a copy for a folder of its own."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from tune.cluster import shared_folder
from tune.cluster.shared_folder import PREFIX, FolderProbe, probe_folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_folder, "SETTLE_SECONDS", 0.0)


def test_hosts_that_share_a_folder_agree_and_nothing_is_left_of_the_probe(tmp_path: Path) -> None:
    with FolderProbe(tmp_path) as probe:
        probe.offer(3)
        assert not probe.is_answered(3)
        assert probe_folder(str(probe.folder), probe.token, 3) is None
        assert probe.is_answered(3)
    assert list(tmp_path.iterdir()) == []


def test_a_host_without_the_folder_does_not_see_what_the_run_writes(tmp_path: Path) -> None:
    with FolderProbe(tmp_path) as probe:
        elsewhere = tmp_path / "another host" / probe.folder.name
        assert probe_folder(str(elsewhere), probe.token, 0) == "does not see what this run writes there"


def test_a_host_whose_folder_is_a_stale_copy_is_not_seen(tmp_path: Path) -> None:
    """Such as a folder that is copied to all nodes when they start, or synchronized one way."""
    with FolderProbe(tmp_path) as probe:
        probe.offer(0)
        shutil.copytree(probe.folder, copy := tmp_path / "copy")
        probe_folder(str(copy), probe.token, 0)
        assert not probe.is_answered(0)


def test_locks_that_do_not_reach_the_other_host_are_a_problem(tmp_path: Path) -> None:
    with FolderProbe(tmp_path) as probe:
        (probe.folder / "lock").unlink()  # the other host then locks another file, as with locks of one host only
        probe.offer(0)
        assert probe_folder(str(probe.folder), probe.token, 0) == "can lock a file that this run has locked"


def test_a_folder_that_the_other_host_cannot_write_is_a_problem(tmp_path: Path) -> None:
    with FolderProbe(tmp_path) as probe:
        (probe.folder / "host-0").mkdir()  # cannot be replaced by a file, also not by root
        problem = probe_folder(str(probe.folder), probe.token, 0)
        assert problem == "cannot write and rename files there (Is a directory)"


def test_the_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / f"{PREFIX}old").mkdir()
    (tmp_path / "trials").mkdir()
    with FolderProbe(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["trials"]


def test_the_lock_of_a_probe_ends_with_it(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with FolderProbe(tmp_path) as probe:
        assert stat.S_ISREG((probe.folder / "lock").stat().st_mode)
    assert set(os.listdir("/proc/self/fd")) == before
