"""Who else can change a path is found out, and private folders are removed only if they are ours and abandoned."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ngpt.system import permissions
from ngpt.system.permissions import (
    LOCK_FILE,
    PREFIX,
    PrivateFolder,
    insecure_content,
    insecure_part,
    is_secret,
    opened_by_another_user,
    remove_abandoned,
)
from tests.helpers.other_user import as_other_user

STRANGER = 54321  # an id without an account
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that only this user can write, whatever the umask."""
    path = tmp_path / "folder"
    path.mkdir()
    path.chmod(0o755)
    assert insecure_part(path, with_contents=True) is None, "the folder of the tests itself is not safe"
    return path


@pytest.mark.parametrize(
    ("mode", "writer"), [(0o757, "other users"), (0o775, "the group "), (0o777, "other users"), (0o2775, "the group ")]
)
def test_a_folder_that_others_can_write_is_named_wherever_it_is_on_the_path(
    folder: Path, mode: int, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "_is_own_group", lambda gid: False)
    (folder / "below").mkdir(mode=0o700)
    folder.chmod(mode)
    found = insecure_part(folder / "below" / "missing")
    assert found is not None and found.startswith(f"{folder} can be written by {writer}")
    assert f"(mode {mode:04o})" in found


def test_the_sticky_bit_protects_names_but_not_what_others_add(folder: Path) -> None:
    folder.chmod(0o1777)
    (folder / "below").mkdir(mode=0o700)
    assert insecure_part(folder) is None
    assert insecure_part(folder / "below", with_contents=True) is None
    assert insecure_part(folder, with_contents=True) == f"{folder} can be written by other users (mode 1777)"


def test_a_file_that_others_can_write_is_unsafe_and_one_they_can_read_is_no_secret(folder: Path) -> None:
    file = folder / "file"
    file.write_text("")
    for mode, part, secret in ((0o600, None, True), (0o644, None, False), (0o602, "file can be written", False)):
        file.chmod(mode)
        assert is_secret(file) is secret
        assert (insecure_part(file) or "").startswith(f"{folder}/{part}" if part else "")


def test_links_are_followed_to_the_folder_that_others_can_write(folder: Path) -> None:
    (folder / "open").mkdir()
    (folder / "open" / "real").mkdir(mode=0o700)
    (folder / "open").chmod(0o777)
    (folder / "first").symlink_to("second")
    (folder / "second").symlink_to(folder / "open" / "real")
    found = insecure_part(folder / "first")
    assert found is not None and found.startswith(f"{folder / 'open'} can be written")
    (folder / "round").symlink_to("round")
    insecure_part(folder / "round")  # ends


@as_root
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_belongs_to_another_user_is_named(folder: Path, kind: str) -> None:
    path = folder / "theirs"
    if kind == "link":
        path.symlink_to(folder)
    elif kind == "file":
        path.touch(0o600)
    else:
        path.mkdir(0o700)
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    assert insecure_part(path) == f"{path} belongs to user {STRANGER}"
    assert insecure_content(folder) == f"{path} belongs to user {STRANGER}"


def test_a_file_below_a_folder_that_others_can_write_is_found(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "code.so").touch(0o644)
    for path in (folder / "a", folder / "a" / "b"):
        path.chmod(0o755)
    (folder / "a" / "link").symlink_to("b")  # its own mode says nothing
    assert insecure_content(folder) is None
    (folder / "a" / "b" / "code.so").chmod(0o666)
    found = insecure_content(folder)
    assert found == f"{folder / 'a' / 'b' / 'code.so'} can be written by other users (mode 0666)"


@pytest.mark.parametrize(
    ("user", "name", "members", "safe"),
    [
        (1000, "me", [], True),  # as many systems create it beside each user
        (1000, "me", ["me"], True),
        (1000, "me", ["me", "you"], False),
        (1000, "staff", [], False),
        (0, "me", [], False),
    ],
)
def test_the_private_group_of_a_user_is_nobody_else(
    user: int, name: str, members: list[str], safe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grp
    import pwd

    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(("me", "", uid, 77, "", "", "")))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "", gid, members)))
    assert permissions._is_own_group(77) is safe
    assert permissions._is_own_group(78) is False


# ---- private folders -------------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from ngpt.system.permissions import PrivateFolder
folder = PrivateFolder(Path(sys.argv[1]))
(folder.path / "socket").touch()
print(folder.path, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_private_folder_can_be_entered_by_its_user_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = PrivateFolder(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert insecure_part(folder.path, with_contents=True) is None
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_is_not(tmp_path: Path) -> None:
    live = PrivateFolder(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    left = Path(done.stdout.strip())
    assert done.returncode == -9 and (left / "socket").exists()
    assert remove_abandoned(tmp_path) == 1
    assert not left.exists() and live.path.exists()
    live.release()
    assert remove_abandoned(tmp_path) == 1


def test_a_folder_that_could_not_be_removed_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a process that is being killed still writes into it."""
    folder = PrivateFolder(tmp_path)
    (folder.path / "logs").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        folder.remove()
    assert (folder.path / "logs").exists()
    assert remove_abandoned(tmp_path) == 1 and list(tmp_path.iterdir()) == []


def test_nothing_is_removed_that_is_not_an_abandoned_private_folder(tmp_path: Path) -> None:
    """Links, folders that others can enter, and folders without the lock file are left alone."""
    target = tmp_path / "target"
    for name in ("target", f"{PREFIX}open", f"{PREFIX}without"):
        (tmp_path / name).mkdir(0o700)
        (tmp_path / name / "precious").touch()
        (tmp_path / name / LOCK_FILE).touch()
    (tmp_path / f"{PREFIX}open").chmod(0o755)
    (tmp_path / f"{PREFIX}without" / LOCK_FILE).unlink()
    (tmp_path / f"{PREFIX}link").symlink_to(target)
    planted = tmp_path / f"{PREFIX}planted"
    planted.mkdir(0o700)
    (planted / LOCK_FILE).symlink_to(target / LOCK_FILE)
    assert remove_abandoned(tmp_path) == 0
    assert len(list(tmp_path.rglob("precious"))) == 3 and planted.exists()


def test_a_link_in_an_abandoned_folder_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    folder = PrivateFolder(tmp_path)
    (folder.path / "link").symlink_to(tmp_path / "precious")
    folder.release()
    assert remove_abandoned(tmp_path) == 1
    assert (tmp_path / "precious" / "file").exists()


@as_root
def test_the_folder_of_another_user_is_left_alone(tmp_path: Path) -> None:
    folder = PrivateFolder(tmp_path)
    folder.release()
    os.chown(folder.path, STRANGER, STRANGER)
    assert remove_abandoned(tmp_path) == 0


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists the owners of connections")
def test_a_connection_belongs_to_who_has_opened_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        with socket.create_connection(address) as own:
            assert not opened_by_another_user(own.getsockname(), address)
            with as_other_user(), socket.create_connection(address) as other:
                assert opened_by_another_user(own.getsockname(), address) is False  # root may see everything
                assert not opened_by_another_user(other.getsockname(), address)
                end = other.getsockname()
                os.seteuid(0)
                assert opened_by_another_user(end, address)
        assert not opened_by_another_user(("127.0.0.1", 1), address)  # nobody has opened this one
