"""The promises of SECURITY.md, tested from outside: secrets, names, errors, and malicious files."""

import json
import os
import pickle
import re
import stat
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
from tests.helpers.real_run import start
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


@pytest.mark.slow
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
        token = home / ".ray" / "auth_token"
        assert token.read_text() != "0123456789abcdef" * 4, "others could have read that"
        assert token.stat().st_mode & 0o777 == 0o600
        raylet = next(process for process in family if process.name() == "raylet")
        assert raylet.environ()["RAY_AUTH_MODE"] == "token"
        printed, _ = run.communicate(timeout=280)
    finally:
        run.kill()
    assert run.returncode == 0, printed
    assert leaks(tmp_path) == [] and not any(value in printed for value in CANARIES.values())


# ---- another user of the machine -------------------------------------------------------------------------------------

# Becomes another user (54321, an id without an account) and tries everything that one may try on a running campaign.
# Prints what each attempt led to: the name of an error, or "done".
ATTACK = """
import http.client, json, os, signal, socket, sys
import grpc

private, session, token, copy, pids, ports, dashboard = json.loads(sys.argv[1])
children = [os.path.join(session, name) for name in ("sockets", "logs", "runtime_resources")]
sockets = [os.path.join(session, "sockets", name) for name in os.listdir(children[0])]
outcomes = {}


def attempt(name, call, *arguments):
    try:
        result = call(*arguments)
    except Exception as error:
        outcomes[name] = type(error).__name__
    else:
        outcomes[name] = result if isinstance(result, str) else "done"


def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(path)


def request(method, path, headers, port=dashboard):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = json.dumps({"entrypoint": "touch /tmp/owned"}) if method == "POST" else None
    connection.request(method, path, body, headers)
    return f"HTTP {connection.getresponse().status}"


def call(port, method, metadata):
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=5, metadata=metadata)
            return "answered"
        except grpc.RpcError as error:
            return error.code().name


# What is imported at the first use is imported now: the other user may not read Python's own files.
"localhost".encode("idna")
call(1, "/ray.rpc.NodeManagerService/GetNodeStats", (("authorization", "none"),))
os.setgroups([])
os.setresgid(54321, 54321, 54321)
os.setresuid(54321, 54321, 54321)

for folder in (private, os.path.dirname(session), session, *children):
    attempt(f"list {folder}", os.listdir, folder)
    attempt(f"open its permissions {folder}", os.chmod, folder, 0o777)
    attempt(f"write into {folder}", open, os.path.join(folder, "planted"), "w")
    attempt(f"plant a link in {folder}", os.symlink, "/etc/passwd", os.path.join(folder, "planted"))
    attempt(f"plant a folder in {folder}", os.mkdir, os.path.join(folder, "planted"))
    attempt(f"swap {folder}", os.rename, folder, folder + "-old")
    attempt(f"remove {folder}", os.rmdir, folder)
for path in sockets:
    attempt(f"connect to {path}", connect, path)
    attempt(f"remove {path}", os.unlink, path)
    attempt(f"swap {path}", os.rename, path, path + "-old")
for path in (token, copy):
    attempt(f"read {path}", open, path)
    attempt(f"write {path}", open, path, "w")
for pid in pids:
    attempt(f"read the environment of {pid}", open, f"/proc/{pid}/environ")
    attempt(f"read the memory of {pid}", open, f"/proc/{pid}/mem")
    attempt(f"enter the folder of {pid}", os.listdir, f"/proc/{pid}/cwd/")
    attempt(f"signal {pid}", os.kill, pid, signal.SIGTERM)
for name in os.listdir("/dev/shm"):
    if "plasma" in name or "ray" in name:
        attempt(f"write /dev/shm/{name}", open, f"/dev/shm/{name}", "r+")
for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
    for method, path in (("GET", "/api/cluster_status"), ("GET", "/nodes?view=summary"), ("POST", "/api/jobs/")):
        attempt(f"{method} {path} {len(headers)}", request, method, path, headers)
for port in ports:
    # What runs code: the agents of the dashboard and of runtime environments, which workers ask over HTTP.
    for path in ("/api/job_agent/jobs/", "/get_or_create_runtime_env"):
        attempt(f"{port} POST {path}", request, "POST", path, {"Authorization": "Bearer " + "0" * 64}, port)
    for metadata in ((), (("authorization", "Bearer " + "0" * 64),)):
        for method in (
            "/ray.rpc.InternalKVGcsService/InternalKVKeys",
            "/ray.rpc.JobInfoGcsService/GetAllJobInfo",
            "/ray.rpc.NodeManagerService/GetNodeStats",
            "/ray.rpc.CoreWorkerService/KillActor",
        ):
            attempt(f"{port} {method} {len(metadata)}", call, port, method, metadata)
print(json.dumps(outcomes))
"""


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, owner and inode of every folder, link and socket in Ray's folder. Ray itself writes files all the time."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            found[str(path)] = (state.st_mode, state.st_uid, state.st_ino)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine_changes_nothing_of_a_running_campaign(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    run = start(write_file(tmp_path, corpus, steps=2000, every=100), tmp_path / "out")
    try:
        run.until_training(0)
        family = run.family()
        (option,) = {word for process in family for word in process.cmdline() if word.startswith("--session-dir=")}
        session = Path(option.partition("=")[2])
        private = session.parents[1]
        connections = [each for process in family for each in process.net_connections("tcp")]
        ports = sorted({each.laddr.port for each in connections if each.status == psutil.CONN_LISTEN})
        (dashboard,) = re.findall(r"dashboard http://127\.0\.0\.1:(\d+)", run.err.read_text())
        before = tree(private)
        facts = [str(private), str(session), str(home / ".ray" / "auth_token"), str(private / "auth_token")]
        facts_and_ids = [*facts, [process.pid for process in (*family, psutil.Process(run.process.pid))], ports]
        command = [sys.executable, "-c", ATTACK, json.dumps([*facts_and_ids, int(dashboard)])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert run.process.poll() is None and tree(private) == before
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    outcomes = json.loads(done.stdout)
    refused = {"PermissionError", "HTTP 401", "HTTP 403", "UNAUTHENTICATED"}
    # A port that does not speak the protocol cannot answer, and a process may have ended meanwhile.
    silent = {"UNAVAILABLE", "UNIMPLEMENTED", "DEADLINE_EXCEEDED", "ProcessLookupError", "FileNotFoundError"}
    silent |= {"HTTP 404", "HTTP 405", "RemoteDisconnected", "BadStatusLine", "ConnectionResetError", "TimeoutError"}
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in refused | silent} == {}
    assert sum(outcome in refused for outcome in outcomes.values()) > 50
    assert any(outcome == "UNAUTHENTICATED" for outcome in outcomes.values()), "the GCS was reached"
    assert {outcomes[f"POST /api/jobs/ {n}"] for n in (0, 1)} <= {"HTTP 401", "HTTP 403"}
    for path in ("/api/job_agent/jobs/", "/get_or_create_runtime_env"):
        found = {outcomes[f"{port} POST {path}"] for port in ports}
        assert found & {"HTTP 401", "HTTP 403"}, f"no agent was reached that serves {path}"
    assert not run.events("worker_died") and not private.exists()


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
    return save_checkpoint(
        root, weights=GPT(cfg).state_dict(), state={}, step=1, val_loss=None, identity=identity, keep_last=1
    )


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
