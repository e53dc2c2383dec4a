"""Campaigns on hosts that share nothing but an object store (tests/helpers/hosts.py, tests/helpers/object_store.py)."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import run_campaign
from tests.helpers.cluster_run import ClusterRun, worker
from tests.helpers.hosts import NEEDS_HOSTS, Host, Network
from tests.helpers.object_store import SECRET, Line, environment, make_bucket, s3_server
from tests.helpers.tiny_campaign import losses, records, train_all, write_file
from tune.remote.results import INTERVAL_VARIABLE, local_folder
from tune.remote.store import ObjectStore, open_store
from tune.remote.unit import newest_step, read_digests, worker_unit
from tune.remote.uri import Uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_HOSTS]
OUT = "s3://bucket/runs"
ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


class Hosts:
    """Hosts with a cache of their own each, an S3 server that all of them reach, and campaigns on them."""

    def __init__(self, network: Network, folder: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        self.network, self._cache = network, folder / "cache"
        here = f"10.77.{network.number}.1"
        self.line = Line(port, here)
        self._settings = environment(self.line.port, here) | {INTERVAL_VARIABLE: "1"}
        for name, value in self._settings.items():
            monkeypatch.setenv(name, value)
        make_bucket("bucket")

    def add(self, name: str, *, size: str = "50%") -> Host:
        """Adds a host whose disk has this size."""
        host = self.network.host(name, private=[self._cache], size=size)
        host.environment |= self._settings | {"NGPT_CACHE": str(self._cache)}
        return host

    def cluster(self, *names: str) -> list[Host]:
        hosts = [self.add(name) for name in names]
        for host in hosts:
            host.start_ray(head=None if host is hosts[0] else hosts[0])
        return hosts

    def run(self, head: Host, file: Path, *, on: Host | None = None) -> ClusterRun:
        root = self._cache / local_folder(Uri(OUT)).relative_to(os.environ["NGPT_CACHE"]) / "tiny"
        return ClusterRun(head, file, OUT, on=on, root=(on or head).path(root))

    def fill(self, host: Host) -> None:
        """Leaves no space on the disk of a host."""
        filler = host.path(self._cache) / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass

    def scratch(self, host: Host) -> list[Path]:
        """What workers have left on a host."""
        return list(host.path(self._cache).glob("scratch/*/trials/*"))


def store() -> ObjectStore:
    return open_store(Uri(f"{OUT}/tiny"))


def uploaded(trial_id: str) -> int:
    """The step of the newest checkpoint of a trial that its worker has uploaded; 0 without one."""
    return newest_step(read_digests(store(), worker_unit(trial_id)) or {}) or 0


def saved(run: ClusterRun, host: Host) -> str | None:
    """The trial that trains on a host, once the store has a checkpoint of it."""
    found = run.training(host)
    return found[0] if found and uploaded(found[0]) else None


def hold(*hosts: Host) -> None:
    """Stops the workers of hosts, so that no trial ends while the test looks."""
    for pid in filter(None, map(worker, hosts)):
        os.kill(pid, signal.SIGSTOP)


def rows(root: Path) -> dict[str, list[tuple[int, float | None]]]:
    """The steps and losses of all trials."""
    paths = sorted(root.glob("trials/*/metrics.jsonl"))
    read = {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in paths}
    return {name: [(row["step"], row.get("train_loss")) for row in lines] for name, lines in read.items()}


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    with Network() as network, s3_server(tmp_path) as port:
        made = Hosts(network, tmp_path, monkeypatch, port)
        yield made
        made.line.cut()


def test_hosts_that_share_only_a_store_give_the_numbers_of_one(hosts: Hosts, tmp_path: Path, corpus: Path) -> None:
    """No credential of a host reaches Ray, a log or the results, and nothing stays in scratch."""
    file = write_file(tmp_path, corpus)
    one, two = hosts.cluster("one", "two")
    run = hosts.run(one, file)
    run.finish()
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline") and rows(run.root) == rows(tmp_path / "inline")
    assert {record["provenance"]["host"] for record in records(run.root)} == {"one", "two"}
    assert not list(run.root.glob("trials/*/checkpoints"))
    assert {uploaded(record["trial_id"]) for record in records(run.root)} == {6}
    assert hosts.scratch(one) == hosts.scratch(two) == []
    with contextlib.redirect_stdout(out := io.StringIO()):
        assert run_campaign.main(["verify", f"{OUT}/tiny"]) == 0
    assert out.getvalue().startswith(f"{OUT}/tiny: intact")
    for folder in (run.root, one.path(Path("/tmp/ray")), two.path(Path("/tmp/ray"))):
        found = subprocess.run(["grep", "-rlsF", "-D", "skip", SECRET, folder], capture_output=True, text=True)
        assert found.stdout == ""


@pytest.mark.long
def test_a_lost_node_and_a_lost_run_cost_only_what_was_not_uploaded(hosts: Hosts, tmp_path: Path, corpus: Path) -> None:
    """The run goes on on a fresh host, from nothing but the address."""
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1, 2]", steps=200, every=20, log_every=20)
    file.write_text(file.read_text().replace("workers: 2}", "workers: 3}"))
    one, two, three = hosts.cluster("one", "two", "three")
    run = hosts.run(one, file, on=two)
    trial = run.until(lambda: saved(run, three))
    hold(one, two, three)
    three.down()
    (died,) = run.until(lambda: run.events("worker_died"))
    assert (died["cause"], died["trial_id"]) == ("node_lost", trial)
    for pid in map(worker, (one, two)):
        os.kill(pid, signal.SIGCONT)
    again = run.until(lambda: (now := run.training_of(trial)) and now.began and now)
    assert again.began % 20 == 0 and again.host in ("one", "two")
    hold(one, two)
    time.sleep(3)  # so that the journal is uploaded
    finished = {event["trial_id"] for event in run.events("trial_finished")}
    two.down()
    run.process.wait(60)
    four = hosts.add("four")
    four.start_ray(head=one)
    run = hosts.run(one, file, on=four)
    while run.process.wait(240) == 3:  # until the lease of the lost run ends
        run = hosts.run(one, file, on=four)
    run.finish()
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline") and rows(run.root) == rows(tmp_path / "inline")
    ended = [event["trial_id"] for event in run.events("trial_finished")]
    assert len(ended) == len(set(ended)) == 4 and finished <= set(ended)
    assert max(event["attempt"] for event in run.events("trial_finished")) > 1


def test_a_store_that_is_away_for_a_while_stops_no_trial(hosts: Hosts, tmp_path: Path, corpus: Path) -> None:
    """Trials end meanwhile: their results count once their files are in the store."""
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1]", steps=200, every=20, log_every=20)
    one, two = hosts.cluster("one", "two")
    run = hosts.run(one, file)
    run.until(lambda: saved(run, one) or saved(run, two))
    hosts.line.cut()
    run.until(lambda: "training goes on" in run.err.read_text())
    time.sleep(8)
    hosts.line.mend()
    run.finish()
    assert "reached again" in run.err.read_text() and run.events("worker_died") == []
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline") and rows(run.root) == rows(tmp_path / "inline")


def test_a_node_that_cannot_use_the_store_is_refused_by_name(hosts: Hosts, tmp_path: Path, corpus: Path) -> None:
    one, two = (hosts.add(name) for name in ("one", "two"))
    two.environment["AWS_ENDPOINT_URL"] = f"http://10.77.{hosts.network.number}.1:9"  # where nothing listens
    one.start_ray()
    two.start_ray(head=one)
    run = hosts.run(one, write_file(tmp_path, corpus))
    assert run.process.wait(240) == 2
    *_, line = run.err.read_text().splitlines()
    assert f"node two ({two.address}) cannot use the store ({OUT}/tiny: " in line
    assert "every node needs credentials of its own" in line
    assert run.events("campaign_started") == []


def test_a_node_whose_disk_fills_up_is_set_aside_and_its_trial_goes_on_elsewhere(
    hosts: Hosts, tmp_path: Path, corpus: Path
) -> None:
    """One that joins with too small a disk gets no trial. Workers are stopped meanwhile, so that no trial ends."""
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1, 2]", steps=200, every=20, log_every=20)
    one, two = hosts.add("one"), hosts.add("two", size="64m")
    one.start_ray()
    two.start_ray(head=one)
    run = hosts.run(one, file)
    trial = run.until(lambda: saved(run, two))
    hold(one, two)
    hosts.fill(two)
    three = hosts.add("three", size="8k")
    three.start_ray(head=one)
    run.until(lambda: f"three ({three.address}) is not used" in run.err.read_text())
    for pid in map(worker, (one, two)):
        os.kill(pid, signal.SIGCONT)
    run.finish()
    (died,) = run.events("worker_died")
    assert (died["cause"], died["trial_id"]) == ("node_unfit", trial)
    joined, filled = [line for line in run.err.read_text().splitlines() if "is not used" in line]
    assert joined.startswith(f"three ({three.address}) is not used: cannot prepare the corpus")
    assert "No space left on device" in joined
    assert filled.startswith(f"two ({two.address}) is not used: its disk is full (") and trial in filled
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline") and rows(run.root) == rows(tmp_path / "inline")
