"""The bundle of CORE is downloaded once and checked, and read neither outside of itself nor without bound."""

import hashlib
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ngpt.data.text.hub as downloading
from ngpt.config.base import ConfigError
from ngpt.downstream import bundle_files
from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.bundle_files import BundleFiles
from tests.helpers import core_bundle
from tests.helpers.hub import Hub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with a small bundle, for which the address and the digest of nanochat's stand here."""
    content = core_bundle.pack(core_bundle.write_bundle(tmp_path / "made"), tmp_path / "made.zip").read_bytes()
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.0)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_files, "SHA256", hashlib.sha256(content).hexdigest())
    with Hub("someone/data") as hub:
        hub.files["eval_bundle.zip"] = content
        monkeypatch.setattr(bundle_files, "SOURCE", f"{hub.url}/cdn/eval_bundle.zip")
        yield hub


def test_the_bundle_is_downloaded_once_and_a_partial_one_is_continued(server: Hub, tmp_path: Path) -> None:
    content, path, lines = server.files["eval_bundle.zip"], bundle_files.downloaded_bundle(), list[str]()
    path.parent.mkdir(parents=True)
    path.with_name("eval_bundle.zip.part").write_bytes(content[:500])
    assert read_bundle("download", limit=5, log=lines.append) == read_bundle(tmp_path / "made", limit=5)
    assert lines == ["bundle of CORE: downloading 1 file, 0.0 MB"]
    assert server.requests == [("eval_bundle.zip", 500)] and path.read_bytes() == content
    server.files.clear()
    assert len(read_bundle("download", log=lines.append)) == 3  # needs nobody any more
    assert len(server.requests) == len(lines) == 1


def test_another_file_and_no_network_are_answered_in_one_line(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    local = "give a local copy of the bundle, a folder or a .zip, with --bundle PATH"
    server.files["eval_bundle.zip"] += b" "
    with pytest.raises(ConfigError, match=rf"eval_bundle\.zip: its SHA-256 is not \w{{12}}\.\.\.; {local}"):
        read_bundle("download")
    del server.files["eval_bundle.zip"]
    with pytest.raises(ConfigError, match=rf"cannot download http.*eval_bundle\.zip: .*404.*; {local}") as missing:
        read_bundle("download")
    monkeypatch.setattr(bundle_files, "SOURCE", "http://127.0.0.1:1/eval_bundle.zip")
    with pytest.raises(ConfigError, match=rf"cannot download .*127\.0\.0\.1:1.*refused.*; {local}") as unreachable:
        read_bundle("download")
    assert "\n" not in f"{missing.value}{unreachable.value}"
    assert not bundle_files.downloaded_bundle().exists()


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_of_a_bundle_is_read_up_to_a_bound(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_files, "MAX_FILE_BYTES", 10_000)
    folder = core_bundle.write_bundle(tmp_path / "made")
    (folder / "eval_data" / "contexts.jsonl").write_text(" " * 10_001)
    path = core_bundle.pack(folder, tmp_path / "small.zip") if packed else folder
    assert not packed or path.stat().st_size < 10_000  # it grows when it is unpacked
    with pytest.raises(ConfigError, match=r"contexts\.jsonl is too large: 10001 bytes, at most 10000 are read"):
        read_bundle(path)


def test_a_file_outside_of_a_bundle_is_not_read(tmp_path: Path) -> None:
    core_bundle.write_bundle(tmp_path / "bundle")
    (tmp_path / "secret").write_text("outside")
    files = BundleFiles(tmp_path / "bundle")
    for name in ("../secret", "eval_data/../../secret", str(tmp_path / "secret")):
        with pytest.raises(ConfigError, match="which is not inside the bundle"):
            files.read(name)


def test_a_damaged_archive_is_refused_by_file(tmp_path: Path) -> None:
    archive = core_bundle.pack(core_bundle.write_bundle(tmp_path / "made"), tmp_path / "made.zip")
    content = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        start = file.getinfo("eval_bundle/eval_data/endings.jsonl").header_offset
    content[start + 120] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(ConfigError, match=r"made\.zip/eval_bundle/eval_data/endings\.jsonl cannot be unpacked: "):
        read_bundle(archive)
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"neither a folder nor a \.zip"):
        read_bundle(archive)
    shutil.rmtree(tmp_path / "made")
    with pytest.raises(ConfigError, match=r"no such bundle: .*; `download` in place of a path downloads nanochat's"):
        read_bundle(tmp_path / "made")
