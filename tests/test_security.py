"""The promises of SECURITY.md, tested from outside: secrets, names, errors, and malicious files."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import run_campaign
from ngpt.config.base import ConfigError, flatten
from ngpt.convert import convert
from ngpt.data.tokens.tokenizer import load_tokenizer
from ngpt.model.config import ModelConfig
from ngpt.model.gpt import GPT
from ngpt.training import checkpoint
from ngpt.training.checkpoint import save_checkpoint
from ngpt.training.load_model import load_model
from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, strict, write_file
from tune.trials.trial import TrialSpec

SCRIPT = Path(__file__).parents[1] / "run_campaign.py"
CANARIES = {
    "WANDB_API_KEY": "ca4a41e50000000000000000000000000000beef",
    "HF_TOKEN": "canary-hf-1f0e2d3c4b5a",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+9a8b7c6d5e4f",
    "GITHUB_TOKEN": "canary-github-00112233",
    "MY_DATABASE_PASSWORD": "canary-password-4455",
}
ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


def leaks(folder: Path) -> list[str]:
    """Files under `folder` that contain a canary, as UTF-8 or UTF-16."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            forms = [form for value in CANARIES.values() for form in (value.encode(), value.encode("utf-16-le"))]
            found += [str(path)] if any(form in content for form in forms) else []
    return found


def environment(home: Path) -> dict[str, str]:
    """An environment with the canaries and its own home directory."""
    home.mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "RAY_"))}
    places = {"HOME": str(home), "WANDB_CACHE_DIR": str(home), "WANDB_CONFIG_DIR": str(home), "OMP_NUM_THREADS": "1"}
    return kept | CANARIES | places


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_no_secret_reaches_a_file_a_log_or_the_tracker(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1]")
    command = [sys.executable, str(SCRIPT), str(file), "--inline", "--out", str(tmp_path / "r")]
    command += ["--set", "tracker.wandb=offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(tmp_path / "home"), timeout=280)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("r/tiny/trials/*/wandb/offline-run-*/*.wandb"))
    assert leaks(tmp_path) == []
    assert not any(value in done.stdout + done.stderr for value in CANARIES.values())


@pytest.mark.slow
def test_no_secret_reaches_a_log_of_ray_and_only_the_owner_reads_its_token(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, steps=300, every=20)
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    (home / ".ray" / "auth_token").chmod(0o644)
    shell = environment(home) | {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, str(SCRIPT), str(file), "--out", str(tmp_path / "r")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=shell)
    try:
        while run.poll() is None and not list(tmp_path.glob("r/tiny/trials/*/metrics.jsonl")):
            time.sleep(0.2)
        family = psutil.Process(run.pid).children(recursive=True)
        words = [word for process in family for word in process.cmdline()]
        (session,) = {word.partition("=")[2] for word in words if word.startswith("--session-dir=")}
        assert leaks(Path(session)) == []
        assert (home / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
        raylet = next(process for process in family if process.name() == "raylet")
        assert raylet.environ()["RAY_AUTH_MODE"] == "token"
        printed, _ = run.communicate(timeout=280)
    finally:
        run.kill()
    assert run.returncode == 0, printed
    assert leaks(tmp_path) == [] and not any(value in printed for value in CANARIES.values())


def test_a_token_that_others_can_read_is_made_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.executors.ray_executor import protect_token

    monkeypatch.setenv("HOME", str(tmp_path))
    protect_token()  # no token yet
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123")
    for mode in (0o644, 0o660, 0o604):
        token.chmod(mode)
        protect_token()
        assert token.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("where", ["comment", "description", "data.path", "option"])
def test_a_campaign_with_a_secret_is_refused_without_repeating_it(
    where: str, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    canary = CANARIES["HF_TOKEN"]
    file, options = write_file(tmp_path, corpus, phases=ONE_PHASE), []
    texts = {"comment": f"# {canary}\n", "description": f"description: {canary}\n", "data.path": ""}
    file.write_text(texts.get(where, "") + file.read_text())
    if where == "data.path":
        file.write_text(
            file.read_text().replace("  device: cpu", "  device: cpu\n  data.path: https://me:s3same@host/")
        )
    if where == "option":
        options = ["--set", f"tracker.project={canary}"]
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "r"), *options]) == 2
    said = capsys.readouterr().err
    assert "secrets do not belong in a file" in said and canary not in said and "s3same" not in said
    assert not (tmp_path / "r").exists()


def test_secrets_are_removed_from_the_error_of_a_trial(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"no answer from https://me:s3same@host/?token={CANARIES['HF_TOKEN']}")

    monkeypatch.setattr("tune.trials.trial.train", fail)
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1]")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "r")]) == 4
    errors = [path.read_text() for path in tmp_path.glob("r/tiny/trials/*/error.txt")]
    assert len(errors) == 2 and all("RuntimeError: no answer from https***" in text for text in errors)
    assert leaks(tmp_path) == []
    assert not any(b"s3same" in path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file())


# ---- names and errors ------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script> | =cmd|'/c calc'!A1 \x1b[31mred\x1b]0;title\x07 \u202egnp.exe"
HOSTILE += " [bold]x[/bold]"


def failing(spec: TrialSpec) -> Any:
    return replace(pretend(spec, status="failed"), error=f"Traceback\nfake: line\nValueError: {HOSTILE}")


def test_hostile_errors_are_shown_as_text_in_files_and_on_the_terminal(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    root = tmp_path / "r" / "tiny"
    with session_on(write_file(tmp_path, corpus, phases=ONE_PHASE), root) as session:
        session.message = lines.append
        drive(begun(session), lambda spec: failing(spec) if spec.config.model.alpha == 0.4 else pretend(spec))
        session.end()
    html, markdown = (root / "report.html").read_text(), (root / "report.md").read_text()
    assert "<script>alert(1)" not in html and "&lt;script&gt;alert(1)" in html
    rows = [line for line in markdown.splitlines() if "ValueError" in line or "fake: line" in line]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 7 for row in rows if row.startswith("|"))
    assert "<script" not in markdown
    for text in (html, markdown, "\n".join(lines)):
        assert "\x1b" not in text and "\u202e" not in text and "\x07" not in text
    for verb in ("report", "status"):
        assert run_campaign.main([verb, str(root)]) == 0
        printed = capsys.readouterr()
        assert "\x1b" not in printed.out + printed.err and "\u202e" not in printed.out
    for record in (root / "alpha" / "trials.jsonl").read_text().splitlines():
        strict(record)


def test_nothing_is_written_outside_the_results(tmp_path: Path, corpus: Path) -> None:
    """Uses the longest and strangest names that are allowed."""
    phase, arm = "A" + ".-_" * 21, "0 = a, b: c + d.-_" + "x" * 62
    phases = f"\n  - {{name: {phase}, runs: [{{arm: baseline}}, {{arm: '{arm}', alpha: 0.2}}]}}\n"
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]")
    before = set(tmp_path.iterdir())
    with session_on(file, tmp_path / "r" / "tiny") as session:
        drive(begun(session))
        session.end()
    assert set(tmp_path.iterdir()) - before == {tmp_path / "r"}
    beside = {"seeds.jsonl", "seeds.lock"}  # the ledger of used seeds
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"tiny"} | beside
    assert (tmp_path / "r" / "tiny" / phase / "summary.json").is_file()


# ---- malicious files -------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.system, (f"touch {self.sign}",)


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


@pytest.fixture
def bomb(sign: Path, tmp_path: Path) -> bytes:
    content = pickle.dumps({"model": Bomb(sign)}, protocol=2)  # torch's own
    pickle.loads(content)
    assert sign.exists()  # the bomb works
    sign.unlink()
    return content


@pytest.fixture
def step(tmp_path: Path) -> Path:
    cfg = ModelConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=300)
    identity = {f"model.{name}": value for name, value in flatten(cfg).items()}
    root = tmp_path / "checkpoints"
    return save_checkpoint(root, model=GPT(cfg), state={}, step=1, val_loss=None, identity=identity, keep_last=1)


def resealed(folder: Path) -> Path:
    """A tampered checkpoint whose digests match, as an attacker would offer it."""
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["sha256"]
    manifest["files"] = {name: checkpoint._digest(folder / name) for name in manifest["files"]}
    manifest["sha256"] = checkpoint._manifest_digest(manifest)
    (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1))
    return folder


def header(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


HEADERS = {
    "endless": header(b"{}", length=2**63),
    "of 100 MB": header(b"{}", length=100_000_000),
    "no JSON": header(b"not json"),
    "nested": header(b"[" * 100_000),
    "out of bounds": header(b'{"wte.weight": {"dtype": "F32", "shape": [300, 8], "data_offsets": [0, 9600]}}'),
    "negative": header(b'{"wte.weight": {"dtype": "F32", "shape": [-1, 8], "data_offsets": [0, 0]}}'),
    "enormous": header(b'{"wte.weight": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}'),
    "of no type": header(b'{"wte.weight": {"dtype": "pickle", "shape": [1], "data_offsets": [0, 1]}}') + b"x",
    "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_tampered_weights_header_is_a_one_line_error(name: str, step: Path) -> None:
    (step / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(ConfigError, match=r"cannot read model\.safetensors"):
        load_model(resealed(step))


def test_a_pickle_in_place_of_weights_never_runs(step: Path, bomb: bytes, sign: Path) -> None:
    (step / "model.safetensors").write_bytes(bomb)
    with pytest.raises(ConfigError):
        load_model(resealed(step))
    assert not sign.exists()


def test_a_pickle_beside_the_weights_is_not_opened(step: Path, bomb: bytes, sign: Path) -> None:
    (step / "state.pt").write_bytes(bomb)
    load_model(resealed(step))
    assert not sign.exists()


@pytest.mark.parametrize("source", ["nvidia", "nanochat"])
@pytest.mark.parametrize("writer", ["pickle", "torch", "torch of old"])
def test_a_bomb_offered_for_conversion_never_runs(
    source: str, writer: str, tmp_path: Path, bomb: bytes, sign: Path
) -> None:
    path = tmp_path / "model_000001.pt"
    path.write_bytes(bomb)
    if writer != "pickle":
        torch.save({"model": Bomb(sign)}, path, _use_new_zipfile_serialization=writer == "torch")
    options = {"n_head": 2, "block_size": 8} | ({"n_kv_head": 2} if source == "nanochat" else {})
    with pytest.raises(ConfigError, match="is not a checkpoint that can be read safely"):
        convert(source, path, out=tmp_path / "out", tokenizer="gpt2", options=options)
    assert not sign.exists() and not (tmp_path / "out").exists()


def test_a_bomb_offered_as_a_tokenizer_never_runs(
    tmp_path: Path, corpus: Path, bomb: bytes, sign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.model"
    path.write_bytes(bomb)
    with pytest.raises(ConfigError, match="is not a sentencepiece model"):
        load_tokenizer(str(path), None)
    file = write_file(tmp_path, corpus, phases=ONE_PHASE)
    file.write_text(file.read_text().replace('"sentencepiece:400"', str(path)))
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "r")]) == 2
    assert "is not a sentencepiece model" in capsys.readouterr().err
    (tmp_path / "encoder.json").write_bytes(bomb)
    (tmp_path / "vocab.bpe").write_bytes(bomb)
    with pytest.raises(ConfigError):
        load_tokenizer(f"gpt2:{tmp_path}", None)
    assert not sign.exists()


def test_no_code_unpickles_a_file() -> None:
    """`torch.load` has `weights_only=True` everywhere."""
    found = []
    for path in sorted([*SCRIPT.parent.glob("ngpt/**/*.py"), *SCRIPT.parent.glob("tune/**/*.py"), SCRIPT]):
        name, text = path.relative_to(SCRIPT.parent).as_posix(), path.read_text(encoding="utf-8")
        unsafe = re.findall(
            r"pickle\.loads?\(|Unpickler\(|allow_pickle=True|weights_only=False|(?<![.\w])(?:eval|exec)\(", text
        )
        unsafe += [call for call in re.findall(r"torch\.load\([^)]*\)", text) if "weights_only=True" not in call]
        found += [f"{name}: {use}" for use in unsafe]
    assert found == []
