"""Campaigns on a Ray cluster of several hosts (tests/helpers/hosts.py)."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import run_campaign
from ngpt.system import gpus
from tests.helpers.cluster_run import ClusterRun, worker
from tests.helpers.hosts import NEEDS_HOSTS, PORT, ROOT, Host, Network, cluster
from tests.helpers.tiny_campaign import write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_HOSTS]
# As a cloud does that takes a spot node back: announces it to Ray, a while before.
DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

gcs = GcsClient(address=sys.argv[1])
(node,) = [n.node_id.hex() for n in gcs.get_all_node_info().values() if n.node_manager_address == sys.argv[2]]
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
print(gcs.drain_node(node, reason, "spot", int(1000 * (time.time() + 600))))
"""
RUN = [sys.executable, ROOT / "run_campaign.py"]


def scores(results: Path, campaign: str = "tiny") -> dict[tuple[str, str], tuple[float, list[str]]]:
    """The mean and the trials of every arm, by phase and arm."""
    summary = json.loads((results / campaign / "summary.json").read_text())
    arms = [(phase["phase"], arm) for phase in summary["phases"] for arm in phase["arms"]]
    return {(phase, arm["arm"]): (arm["score"]["mean"], arm["trial_ids"]) for phase, arm in arms}


def test_three_hosts_give_the_numbers_of_one(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus)
    with cluster("one", "two", "three") as (head, *_):
        done = head.run([*RUN, file, "--address", f"{head.address}:{PORT}", "--out", tmp_path / "three"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "one")]) == 0
    assert scores(tmp_path / "three") == scores(tmp_path / "one")


@dataclass
class Disturbed:
    """A campaign on a cluster, seen through its files while it runs."""

    process: subprocess.Popen[str]
    root: Path

    def events(self, name: str) -> list[dict[str, Any]]:
        journal = self.root / "journal.jsonl"
        lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
        read = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in read if event["event"] == name]

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.process.poll() is None, "the campaign ended too early"
            assert time.monotonic() < deadline, "the cluster does not do what it should"
            time.sleep(0.05)

    def freeze(self, hosts: Sequence[Host], *, after: int) -> dict[str, int]:
        """Stops the worker of each host once its trial is after that step; returns their process ids, by host."""
        frozen: dict[str, int] = {}

        def all_frozen() -> bool:
            ids = {
                f"ray::{self.root.name} {e['phase']}/{e['arm']} seed {e['seed']}": e["trial_id"]
                for e in self.events("trial_started")
            }
            for host in (host for host in hosts if host.name not in frozen):
                for pid in host.pids():
                    with contextlib.suppress(OSError, KeyError, ValueError):  # not a worker, or it is about to write
                        title = Path(f"/proc/{pid}/cmdline").read_bytes().strip(b"\0 ").decode()
                        beat = (self.root / "trials" / ids[title] / "heartbeat").read_text()
                        if json.loads(beat)["step"] > after:
                            os.kill(pid, signal.SIGSTOP)
                            frozen[host.name] = pid
            return len(frozen) == len(hosts)

        self.until(all_frozen)
        return frozen


def test_a_host_killed_one_drained_and_one_added_in_the_middle_change_nothing_but_time(
    tmp_path: Path, corpus: Path
) -> None:
    """Trials are stopped meanwhile, so that they are in the middle on any machine."""
    phases = "\n  - name: alpha\n    vary: {alpha: [0.05, 0.4]}\n"
    file = write_file(tmp_path, corpus, phases=phases, steps=800, every=20, log_every=20)
    file.write_text(file.read_text().replace("workers: 2}", "workers: 9}"))
    with Network() as network:
        one, two, three = network.cluster("one", "two", "three")
        address = f"{one.address}:{PORT}"
        with (tmp_path / "stderr").open("w") as stderr:
            command = [*RUN, file, "--address", address, "--out", tmp_path / "many"]
            run = Disturbed(one.start(command, stdout=stderr, stderr=stderr), tmp_path / "many/tiny")
        frozen = run.freeze([one, two, three], after=20)
        network.host("four").start_ray(head=one)
        run.until(lambda: len(run.events("trial_started")) == 4)  # the fourth trial, on host four
        drained = one.run([sys.executable, "-c", DRAIN, address, two.address])
        assert "True" in drained.stdout, drained.stdout + drained.stderr
        run.until(lambda: list(run.root.glob("trials/*/stop")))
        os.kill(frozen["two"], signal.SIGCONT)
        run.until(lambda: run.events("worker_died"))
        three.down()
        run.until(lambda: len(run.events("worker_died")) == 2)
        os.kill(frozen["one"], signal.SIGCONT)
        assert run.process.wait(600) == 0, (tmp_path / "stderr").read_text()
    ended, died = run.events("trial_finished"), run.events("worker_died")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "one")]) == 0
    assert scores(tmp_path / "many") == scores(tmp_path / "one")
    assert [event["cause"] for event in died] == ["node_lost"] * 2
    assert {event["provenance"]["host"] for event in ended} <= {"one", "four"}
    assert sorted(event["attempt"] for event in ended) == [1, 1, 2, 2]
    assert [event["workers"] for event in run.events("workers_changed")][:2] == [4, 3]


@pytest.mark.long
def test_the_quickstart_on_three_hosts_of_which_one_is_replaced_gives_the_numbers_of_one_host(tmp_path: Path) -> None:
    file = ROOT / "experiments/quickstart.yaml"
    with Network() as network:
        one, _, three = network.cluster("one", "two", "three")
        run = ClusterRun(one, file, tmp_path / "three", name="quickstart")
        run.until(lambda: len(run.events("trial_finished")) >= 4 and worker(three))
        three.down()
        run.until(lambda: run.events("worker_died"))
        network.host("four").start_ray(head=one)
        run.finish()
    ended = run.events("trial_finished")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "one")]) == 0
    assert scores(tmp_path / "three", "quickstart") == scores(tmp_path / "one", "quickstart")
    assert {"one", "two", "three", "four"} == {event["provenance"]["host"] for event in ended}


# Ray's own stand-in for a cloud: its nodes are processes on the host of the head, and have what the file says.
AUTOSCALER = {
    "cluster_name": "from-zero",
    "max_workers": 1,
    "idle_timeout_minutes": 60,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        **dict.fromkeys(("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True),
    },
    **{name: {} for name in ("auth", "docker", "file_mounts")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
    **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    "file_mounts_sync_continuously": False,
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 1},
    },
}
FROM_ZERO = """
import sys
from tune.executors.ray_cluster import RayCluster
from tune.spec.schema import Resources

for seconds in (None, 120):
    with RayCluster(Resources(wait_for_nodes=seconds), address=sys.argv[1], report=print) as cluster:
        print(cluster.workers, cluster.per_trial)
"""


@pytest.mark.skipif(gpus.is_available(), reason="torch could use the GPU that Ray is told of")
def test_gpus_from_zero_are_asked_for_and_never_replaced_by_a_cpu(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus)
    text = file.read_text().replace("workers: 2}", "wait_for_nodes: 5}").replace("device: cpu", "device: auto")
    file.write_text(text)
    with Network() as network:
        host = network.host("one")
        address = "127.0.0.1:6379"  # where the nodes of the autoscaler look for their head
        host.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        (config := tmp_path / "autoscaler.yaml").write_text(json.dumps(AUTOSCALER))
        head = ["--node-ip-address=127.0.0.1", "--port=6379"]
        host.start_ray(options=[*head, f"--autoscaling-config={config}"])
        started = host.run([sys.executable, "-c", FROM_ZERO, address])
        assert started.returncode == 0, started.stdout + started.stderr
        done = host.run([*RUN, file, "--address", address, "--out", tmp_path / "results"])
    meant = "(base.device: cpu says that "
    no_gpu = "base.device is auto, and no node of the cluster has a GPU"
    lines = [line for line in started.stdout.splitlines() if "GPU" in line]
    assert lines[0] == f"warning: {no_gpu}: trials train on the CPU {meant}this is meant)"
    assert lines[1] == "1 {'CPU': 1.0, 'GPU': 0.0}"
    assert lines[2].startswith(f"{no_gpu} {meant}trials are to train on the CPU): waiting up to 120 s for a node")
    assert lines[-1] == "1 {'CPU': 1.0, 'GPU': 1.0}"
    assert done.returncode == 1
    assert re.search(r"\) is not used: Ray offers a GPU, but this torch is built without CUDA; workers 0", done.stderr)
    assert "has had room for a trial for 5 s; add nodes" in done.stderr
    journal = (tmp_path / "results/tiny/journal.jsonl").read_text()
    assert '"trial_finished"' not in journal
