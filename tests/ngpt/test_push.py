"""The command that uploads: nothing is sent without --yes, and then exactly what was shown."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.push import main
from tests.helpers.model_hub import ModelHub

TOKEN = "hf_" + "t" * 34
TARGET = ["--to", "somebody/tiny-ngpt"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an export writes, with weights of a few bytes."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "ngpt"}')
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n# a model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # its storage is another service
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with ModelHub(TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_yes_it_shows_what_it_would_send_and_asks_nobody(
    folder: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *TARGET]) == 0
    shown = capsys.readouterr()
    assert [line.split() for line in shown.out.splitlines()] == [
        ["README.md", "45", "bytes"],
        ["config.json", "22", "bytes"],
        ["model.safetensors", "2,048", "bytes"],
    ]
    assert "3 files, 2,115 bytes, to somebody/tiny-ngpt, private if it is new" in shown.err
    assert "--yes" in shown.err
    assert hub.requests == []


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx, to huggingface_hub
def test_with_yes_the_repository_holds_the_files_bit_for_bit(
    folder: Path, hub: ModelHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *TARGET, "--yes"]) == 0
    assert hub.files == {"somebody/tiny-ngpt": contents(folder)}
    assert hub.private == {"somebody/tiny-ngpt": True}
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/somebody/tiny-ngpt"
    assert hub.commits == [("main", "Upload the model")] and hub.branches == []
    (folder / "config.json").write_text("{}")  # the repository exists by now
    branch = ["--revision", "longer", "--commit-message", "Train twice as long"]
    assert main([str(folder), *TARGET, "--yes", "--public", *branch]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.url}/somebody/tiny-ngpt/tree/longer"
    assert hub.commits[1:] == [("longer", "Train twice as long")] and hub.branches == ["longer"]
    assert hub.files == {"somebody/tiny-ngpt": contents(folder)}
    assert hub.private == {"somebody/tiny-ngpt": True}


@pytest.mark.parametrize(
    ("token", "refuses", "message"),
    [
        (None, None, "there is no token for the hub: sign in with `hf auth login`, or set HF_TOKEN"),
        ("hf_wrong", None, "the hub does not accept the token: sign in"),
        (TOKEN, 403, "the token may not write to repositories of somebody: sign in"),
        (TOKEN, 400, "cannot upload to somebody/tiny-ngpt: "),
    ],
)
def test_a_problem_with_the_token_or_the_hub_is_one_line(
    folder: Path,
    hub: ModelHub,
    token: str | None,
    refuses: int | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.refuses = refuses
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert main([str(folder), *TARGET, "--yes"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "files" not in line]
    assert len(lines) == 1 and lines[0].startswith(message)
    assert hub.files == {} and TOKEN not in lines[0]


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("tiny", lambda folder: None, "'tiny' is not the name of a repository: write OWNER/NAME"),
        ("a/b/c", lambda folder: None, "'a/b/c' is not the name of a repository"),
        ("a/b", lambda folder: (folder / "README.md").unlink(), "it has no README.md"),
        ("a/b", lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
        ("a/b", lambda folder: (folder / "checkpoints").mkdir(), "checkpoints is not a regular file"),
    ],
)
def test_what_is_no_exported_folder_or_no_repository_is_refused(
    folder: Path, target: str, change: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    change(folder)
    assert main([str(folder), "--to", target]) == 2
    assert message in capsys.readouterr().err
