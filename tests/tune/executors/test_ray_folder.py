"""Where a private Ray keeps its files, and whose token it uses."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tune.executors import ray_folder
from tune.executors.ray_folder import TOKEN_FILE, NoRoomForRay, RayFolder, check_machine, provide_token
from tune.machine.ray_limits import MAX_ROOT_BYTES

KNOWN = "0123456789abcdef" * 4


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home directory without a token, in a shell without Ray's variables."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "home"
    path.mkdir(mode=0o755)
    monkeypatch.setenv("HOME", str(path))
    yield path


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Where the token of this Ray goes."""
    return tmp_path / TOKEN_FILE


@pytest.fixture
def lines() -> list[str]:
    return []


def write_token(path: Path, mode: int) -> Path:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.write_text(KNOWN)
    path.chmod(mode)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_token_is_made_for_its_user_alone(home: Path, copy: Path, lines: list[str]) -> None:
    before = os.umask(0)
    try:
        assert provide_token(copy, lines.append) == "ray get-auth-token"
    finally:
        os.umask(before)
    token = home / ".ray" / "auth_token"
    assert len(token.read_text()) == 64 and copy.read_text() == token.read_text()
    assert (mode(token), mode(token.parent), mode(copy)) == (0o600, 0o700, 0o600) and lines == []


def test_a_token_that_only_its_user_knows_is_kept(home: Path, copy: Path, lines: list[str]) -> None:
    token = write_token(home / ".ray" / "auth_token", 0o600)
    assert provide_token(copy, lines.append) == "ray get-auth-token"
    assert token.read_text() == copy.read_text() == KNOWN and lines == []


@pytest.mark.parametrize("open_mode", [0o644, 0o660, 0o604, 0o640, 0o602])
@pytest.mark.parametrize("place", ["home", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_others_could_have_read_or_written_is_renewed_and_that_is_said(
    place: str, open_mode: int, home: Path, copy: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = home / ".ray" / "auth_token" if place == "home" else home / "tokens" / "mine"
    write_token(path, open_mode)
    if place != "home":
        monkeypatch.setenv(place, str(path))
    assert provide_token(copy, lines.append) == "ray get-auth-token"
    assert path.read_text() == copy.read_text() != KNOWN
    assert (mode(path), mode(copy)) == (0o600, 0o600)
    (line,) = lines
    assert str(path) in line and f"(mode {open_mode:04o}): it has a new token now" in line


def test_the_token_of_the_environment_is_used(
    home: Path, copy: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_token(home / "mine", 0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert provide_token(copy, lines.append) == "ray get-auth-token"
    assert copy.read_text() == KNOWN
    monkeypatch.setenv("RAY_AUTH_TOKEN", "abc" * 20)
    provide_token(copy, lines.append)
    assert copy.read_text() == "abc" * 20 and mode(copy) == 0o600
    assert not (home / ".ray").exists() and path.read_text() == KNOWN and lines == []


def test_a_token_file_of_the_environment_that_is_missing_is_an_error(
    home: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "none"))
    with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH=.*/none: No such file or directory"):
        provide_token(copy, print)
    assert not copy.exists()


def test_a_link_in_the_place_of_a_token_is_not_written_through(home: Path, copy: Path, lines: list[str]) -> None:
    precious = write_token(home / "precious", 0o644)
    (home / ".ray").mkdir(mode=0o700)
    (home / ".ray" / "auth_token").symlink_to(precious)
    provide_token(copy, lines.append)
    assert precious.read_text() == KNOWN and not (home / ".ray" / "auth_token").is_symlink()
    assert copy.read_text() != KNOWN


def test_a_folder_that_others_can_write_holds_no_token(home: Path, copy: Path, lines: list[str]) -> None:
    token = write_token(home / ".ray" / "auth_token", 0o600)
    home.chmod(0o777)
    assert provide_token(copy, lines.append) == f"cat {copy}"
    assert token.read_text() == KNOWN != copy.read_text()
    assert lines == [
        f"{home} can be written by other users (mode 0777): this Ray uses a token of its own instead of {token}"
    ]


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe"])
def test_an_empty_or_unreadable_token_is_not_used(text: bytes, home: Path, copy: Path, lines: list[str]) -> None:
    write_token(home / ".ray" / "auth_token", 0o600).write_bytes(text)
    provide_token(copy, lines.append)
    assert len(copy.read_text()) == 64 and lines == []


@pytest.mark.parametrize("reason", ["unset", "read-only"])
def test_without_a_home_that_can_be_written_ray_gets_a_token_of_its_own(
    reason: str, home: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "unset":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        (home / ".ray").touch()  # as on a read-only file system, no folder can be made; root may write anywhere else
    assert provide_token(copy, print) == f"cat {copy}"
    assert len(copy.read_text()) == 64 and mode(copy) == 0o600


# ---- the place -------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the shell, which is as short as it has to be."""
    path = tmp_path / "t"
    path.mkdir(mode=0o755)
    monkeypatch.setattr("tune.machine.ray_limits.MAX_ROOT_BYTES", len(os.fsencode(path)))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(path))
    return path


def test_the_folder_is_for_its_user_alone_and_those_of_killed_runs_are_removed(root: Path) -> None:
    killed = RayFolder(report=print)
    killed.release()
    folder = RayFolder(report=print)
    assert folder.path.parent == root and list(root.iterdir()) == [folder.path]
    assert mode(folder.path) == 0o700 and mode(folder.path / TOKEN_FILE) == 0o600
    folder.remove()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("depth", [0, 1])
def test_a_place_that_others_can_write_is_refused_in_a_line_that_names_it(
    variable: str, depth: int, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = root / "below" if depth else root
    place.mkdir(mode=0o700, exist_ok=True)
    monkeypatch.setattr("tune.machine.ray_limits.MAX_ROOT_BYTES", len(os.fsencode(place)))
    monkeypatch.setenv(variable, str(place))
    root.chmod(0o777)
    with pytest.raises(ConfigError) as refusal:
        RayFolder(report=print)
    (line,) = str(refusal.value).splitlines()
    assert line.startswith(f"Ray's files: {root} can be written by other users (mode 0777), who could then replace")
    assert "set TMPDIR" in line and [path for path in root.rglob("*") if path != place] == []


def test_a_full_place_is_an_error_of_input_and_output(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.machine.ray_limits.MIN_DISK", 1 << 60)
    with pytest.raises(NoRoomForRay, match=r"^Ray's files: .* MiB free, Ray's logs need .*: set TMPDIR"):
        check_machine(1)
    assert NoRoomForRay.exit_code == 74 and list(root.iterdir()) == []


def test_a_token_that_cannot_be_used_leaves_no_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(root / "none"))
    with pytest.raises(ConfigError):
        RayFolder(report=print)
    assert list(root.iterdir()) == []


def test_a_limit_of_the_machine_is_an_error_before_anything_is_made(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_folder, "ray_limit_problem", lambda workers: f"too little for {workers}")
    with pytest.raises(ConfigError, match=r"^too little for 7$"):
        check_machine(7)
    assert list(root.iterdir()) == []


def test_the_longest_root_leaves_room_for_the_longest_socket() -> None:
    from ray._private.utils import validate_socket_filepath

    session = "session_2026-11-21_19-00-59_197422_4194304"
    path = f"/{'x' * (MAX_ROOT_BYTES - 1)}/ngpt-abcdefgh/{ray_folder.TEMPORARY}/{session}/sockets/dash_TaskEventsHead"
    validate_socket_filepath(path)
    assert len(path) == 107  # the longest that Linux allows
