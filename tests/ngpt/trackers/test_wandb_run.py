"""Weights & Biases is used online if it can be reached, and never waited for otherwise."""

import contextlib
import errno
import gzip
import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ngpt.trackers.server import server_problem
from ngpt.trackers.wandb_run import key_problem, resolve_mode, run_id
from tests.helpers.wandb_file import named, python, records

REFUSED = f"127.0.0.1 cannot be reached ([Errno {errno.ECONNREFUSED}] Connection refused)"
KEY = "0123456789abcdef" * 3


@contextlib.contextmanager
def server(status: int) -> Iterator[str]:
    """A web server that answers every request with `status`; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing."""

    with serving(Handler) as url:
        yield url


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A web server; yields its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{service.server_port}"
        finally:
            service.shutdown()
            thread.join()


@contextlib.contextmanager
def black_hole() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides keys and proxies of the machine that runs the tests."""
    for name in os.environ:
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)


# ---- the probe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 401, 404])
def test_any_answer_below_500_means_the_server_is_up(status: int) -> None:
    with server(status) as url:
        assert server_problem(url, timeout=5) is None


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_status_of_500_or_more_means_the_server_is_down(status: int) -> None:
    with server(status) as url:
        assert server_problem(url, timeout=5) == f"127.0.0.1 answers with status {status}"


def test_a_closed_port_is_reported() -> None:
    assert server_problem(closed_port(), timeout=5) == REFUSED


def test_a_silent_server_costs_only_the_timeout() -> None:
    with black_hole() as url:
        answer = server_problem(url, timeout=0.2)
    assert answer in ("127.0.0.1 does not answer within 0.2 s", "127.0.0.1 cannot be reached (timed out)")


def test_a_password_in_the_address_is_not_shown() -> None:
    url = closed_port().replace("http://", "http://user:secret@")
    assert "secret" not in (server_problem(url, timeout=5) or "") + (key_problem(url) or "")


# ---- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_key_may_be_in_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert key_problem("https://wandb.example.org") == (
        "no key for wandb.example.org is configured (wandb login, or WANDB_API_KEY)"
    )
    monkeypatch.setenv(name, KEY)
    assert key_problem("https://wandb.example.org") is None


@pytest.mark.parametrize(
    ("machine", "url", "found"),
    [
        ("wandb.example.org", "https://wandb.example.org", True),
        ("wandb.example.org", "https://wandb.example.org:8080", False),
        ("wandb.example.org:8080", "https://wandb.example.org:8080", True),
        ("api.wandb.ai", "https://wandb.example.org", False),
        ("api.wandb.ai", "https://api.forge.coreweave.com", True),  # two names of one service
    ],
)
def test_a_netrc_key_belongs_to_one_server(tmp_path: Path, machine: str, url: str, found: bool) -> None:
    (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    assert (key_problem(url) is None) == found


def test_netrc_is_respected_and_a_damaged_file_is_not_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys"
    monkeypatch.setenv("NETRC", str(path))
    path.write_text(f"machine host login user password {KEY}\n")
    assert key_problem("http://host") is None
    path.write_text(f"machine host\n{KEY}\n")
    assert key_problem("http://host") == f"{path} cannot be read (NetrcParseError)"


# ---- the choice ----------------------------------------------------------------------------------------------------

CHOOSE = """
import json, os, sys
from pathlib import Path
from ngpt.trackers.wandb_run import resolve_mode
from ngpt.config.base import ConfigError
for wanted, environment in json.loads(os.environ["CASES"]):
    os.environ.update(environment)
    messages = []
    try:
        mode = resolve_mode(wanted, Path("results", "trials", "*"), messages.append)
    except ConfigError as error:
        mode = str(error)
    print(json.dumps([mode, *messages]))
    for name in environment:
        del os.environ[name]
"""


def test_auto_is_online_with_key_and_server_and_otherwise_reports_why_not(tmp_path: Path) -> None:
    later = "upload later with: wandb sync results/trials/*/wandb/offline-run-*"
    settings = tmp_path / "configured" / "settings"
    settings.parent.mkdir()
    settings.write_text("[default]\nmode = offline\n")
    closed = closed_port()
    with server(404) as url:
        key = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
        unreachable = key | {"WANDB_BASE_URL": closed}
        default = "as WANDB_MODE or wandb's settings file says"
        refused = "wandb refuses its WANDB_ variables or its settings file: mode 'bogus': Input should be 'online', "
        refused += "'offline', 'shared', 'disabled', 'dryrun' or 'run'; "
        refused += "mend it, or set tracker.wandb to offline or disabled"
        keyless = "no key for 127.0.0.1 is configured (wandb login, or WANDB_API_KEY)"
        cases = [
            ("auto", key, ["online", "W&B: online, 127.0.0.1 answers"]),
            ("online", key, ["online"]),
            ("auto", {"WANDB_BASE_URL": url}, ["offline", f"W&B: offline, since {keyless}; {later}"]),
            ("auto", unreachable, ["offline", f"W&B: offline, since {REFUSED}; {later}"]),
            ("online", unreachable, [f"tracker.wandb is online, but {REFUSED}; set it to auto or offline"]),
            ("online", {"WANDB_BASE_URL": url}, [f"tracker.wandb is online, but {keyless}; set it to auto or offline"]),
            ("auto", key | {"WANDB_MODE": "disabled"}, ["disabled", f"W&B: disabled, {default}"]),
            ("auto", key | {"WANDB_CONFIG_DIR": str(settings.parent)}, ["offline", f"W&B: offline, {default}"]),
            ("online", key | {"WANDB_MODE": "offline"}, ["online"]),
            ("online", key | {"WANDB_DISABLED": "true"}, ["disabled", "W&B: disabled, as WANDB_DISABLED says"]),
            ("offline", {"WANDB_DISABLED": "true"}, ["disabled", "W&B: disabled, as WANDB_DISABLED says"]),
            ("auto", key | {"WANDB_DISABLED": "false"}, ["online", "W&B: online, 127.0.0.1 answers"]),
            ("auto", key | {"WANDB_MODE": "bogus"}, [refused]),
        ]  # fmt: skip
        given = json.dumps([case[:2] for case in cases])
        done = python(CHOOSE, tmp_path, CASES=given)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [case[2] for case in cases]
    assert done.stderr == ""


def test_offline_and_disabled_need_no_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    assert [resolve_mode(mode, tmp_path) for mode in ("offline", "disabled")] == ["offline", "disabled"]
    with pytest.raises(ImportError):
        resolve_mode("auto", tmp_path)


# ---- a run ---------------------------------------------------------------------------------------------------------


class FakeServer(http.server.BaseHTTPRequestHandler):
    """The part of W&B's API that one run needs. It knows no earlier run and records what it receives."""

    protocol_version = "HTTP/1.1"
    graphql: ClassVar[list[dict[str, Any]]] = []
    streams: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        self.reply({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        if self.path == "/graphql":
            asked = json.loads(body)
            self.graphql.append(asked)
            self.reply({"data": self.answer(asked["query"])})
        else:
            if self.path.endswith("/file_stream"):
                self.streams.append(json.loads(body))
            self.reply({})  # telemetry

    def answer(self, query: str) -> dict[str, Any]:
        if "upsertBucket" in query:
            project = {"id": "P", "name": "spheres", "entity": {"id": "E", "name": "me"}}
            return {"upsertBucket": {"bucket": {"id": "B", "name": "run", "project": project}, "inserted": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": []}}
        return {"viewer": {"id": "V", "entity": "me", "flags": "{}"}, "model": None}

    def reply(self, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""


ONLINE = """
import os
from pathlib import Path
from ngpt.trackers.base import TrackedRun, histogram
from ngpt.trackers.wandb_run import WandbRun, resolve_mode
folder = Path(os.environ["FOLDER"], "0123456789")
folder.mkdir(parents=True)
mode = resolve_mode("online", folder)
tracked = TrackedRun(folder, project="spheres", group="g", settings={"lr": 0.5})
with WandbRun(tracked, mode=mode, name="n", job_type="j") as run:
    run.log({"step": 4, "val/loss": 2.5})
    run.log_histograms(4, {"alpha/mlp.0": histogram([0.0, 1.0])})
    run.note({"skipped_shards": ["a"]})
    run.log({"step": 2, "val/loss": 3.5})
"""


def test_an_online_run_sends_its_id_its_steps_and_its_settings(tmp_path: Path) -> None:
    with serving(FakeServer) as url:
        foreign = {"WANDB_SWEEP_ID": "abcd1234", "WANDB_MODE": "offline", "WANDB_RUN_ID": "x", "WANDB_PROJECT": "y"}
        done = python(ONLINE, tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=url, **foreign)
    assert (done.stdout, done.stderr) == ("", "")
    upserts = [asked["variables"] for asked in FakeServer.graphql if "upsertBucket" in asked["query"]]
    first = upserts[0]
    assert first["name"] == run_id(tmp_path / "run" / "0123456789", project="spheres", group="g")
    assert (first["project"], first["groupName"], first["jobType"], first["displayName"]) == ("spheres", "g", "j", "n")
    config = json.loads(upserts[-1]["config"])
    assert config["lr"] == {"value": 0.5}
    axes = {metric["1"]: metric["5"] for metric in config["_wandb"]["value"]["m"] if "5" in metric}
    assert axes.keys() == {"val/loss", "alpha/mlp.0"}
    assert [config["_wandb"]["value"]["m"][index - 1]["1"] for index in set(axes.values())] == ["step"]
    history, summary = [], {}
    for stream in FakeServer.streams:
        files = stream.get("files", {})
        history += map(json.loads, files.get("wandb-history.jsonl", {"content": []})["content"])
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            summary = json.loads(line)
    assert [(row["step"], row.get("val/loss")) for row in history] == [(4, 2.5), (4, None), (2, 3.5)]
    assert history[1]["alpha/mlp.0"]["values"] == [1] + [0] * 30 + [1]
    assert summary["skipped_shards"] == ["a"]


LOSE = """
import json, os
from pathlib import Path
import ngpt.trackers.wandb_run
from ngpt.trackers.base import TrackedRun
from ngpt.trackers.wandb_run import WandbRun
ngpt.trackers.wandb_run.INIT_TIMEOUT = 1.0
for name in ("first", "second"):
    folder = Path(os.environ["FOLDER"], name)
    folder.mkdir(parents=True)
    tracked = TrackedRun(folder, project="p", group="g", settings={"lr": 0.5})
    with WandbRun(tracked, mode="online", name=name, job_type="j") as run:
        run.log({"step": 4, "val/loss": 2.5})
        run.log({"step": 2, "val/loss": 3.5})
"""


@pytest.mark.slow
def test_a_lost_server_turns_runs_offline_without_losing_rows(tmp_path: Path) -> None:
    done = python(LOSE, tmp_path, WANDB_API_KEY=KEY, WANDB_BASE_URL=closed_port())
    (message,) = done.stderr.splitlines()  # the second run neither waits nor prints
    assert message.startswith("W&B: offline from here on, since ")
    assert message.endswith(f"upload later with: wandb sync {tmp_path}/run/first/wandb/offline-run-*")
    for name in ("first", "second"):
        (log,) = (tmp_path / "run" / name).glob("wandb/offline-run-*/run-*.wandb")
        history = [named(record.history.item) for record in records(log) if record.HasField("history")]
        assert [(row["step"], row["val/loss"]) for row in history] == [(4, 2.5), (2, 3.5)]
        metrics = [record.metric for record in records(log) if record.HasField("metric")]
        assert [(metric.name, metric.step_metric) for metric in metrics if metric.name != "step"] == [
            ("val/loss", "step")
        ]
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert holding == []


def test_a_run_id_depends_on_the_campaign_and_the_trial_only(tmp_path: Path) -> None:
    here, there = tmp_path / "a" / "0123456789", tmp_path / "b" / "0123456789"
    first = run_id(here, project="p", group="campaign")
    assert run_id(there, project="p", group="campaign") == first
    others = [
        run_id(here, project="p", group="other"),
        run_id(here, project="q", group="campaign"),
        run_id(tmp_path / "a" / "1123456789", project="p", group="campaign"),
        run_id(here, project="pc", group="ampaign"),
    ]
    assert len({first, *others}) == 5
    assert not here.exists()


def test_a_run_outside_campaigns_keeps_its_id_in_its_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    first = run_id(one, project="p", group="")
    assert run_id(one, project="p", group="") == first != run_id(other, project="p", group="")
    assert run_id(one.rename(tmp_path / "moved"), project="p", group="") == first
    one.mkdir()
    assert run_id(one, project="p", group="") != first  # the id does not come from the path
