"""A node that is taken back without a warning to Ray: its processes get SIGTERM, as from a cloud or from `ray stop`."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers.cluster_run import ClusterRun, processes, worker
from tests.helpers.hosts import NEEDS_HOSTS, Host, cluster
from tests.helpers.tiny_campaign import losses, train_all, write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_HOSTS]
PHASES = """
  - name: alpha
    vary: {alpha: [0.05, 0.2, 0.4]}
"""
EVERY = 20  # steps between checkpoints


def hold(run: ClusterRun, host: Host) -> str:
    """Stops the worker of a host once its trial has a checkpoint; returns the trial."""
    trial, _ = run.until(lambda: (now := run.training(host)) and now[1].step > EVERY and now)
    os.kill(worker(host), signal.SIGSTOP)
    return trial


def test_nodes_that_get_sigterm_or_ray_stop_in_the_middle_change_nothing_but_time(tmp_path: Path, corpus: Path) -> None:
    """Workers are stopped until it is the turn of their node, so that they are in the middle on any machine."""
    file = write_file(tmp_path, corpus, phases=PHASES, seeds="[1]", steps=600, every=EVERY, log_every=EVERY)
    file.write_text(file.read_text().replace("workers: 2}", "workers: 3}"))
    with cluster("one", "two", "three") as (one, two, three):
        run = ClusterRun(one, file, tmp_path / "out")
        _, *lost = [hold(run, host) for host in (one, two, three)]
        os.kill(worker(two), signal.SIGCONT)
        (raylet,) = processes(two, "/raylet/raylet ")
        os.kill(raylet, signal.SIGTERM)
        run.until(lambda: run.events("worker_died"))
        os.kill(worker(three), signal.SIGCONT)
        three.start([sys.executable, "-m", "ray.scripts.scripts", "stop"])
        run.until(lambda: len(run.events("worker_died")) == 2)
        os.kill(worker(one), signal.SIGCONT)
        again = run.until(lambda: next((beat for beat in map(run.training_of, lost) if beat and beat.began), None))
        run.finish()
    assert again.host == "one" and again.began % EVERY == 0
    died, ended = run.events("worker_died"), run.events("trial_finished")
    assert [(event["cause"], event["trial_id"]) for event in died] == [("node_lost", trial_id) for trial_id in lost]
    assert {event["trial_id"] for event in ended if event["attempt"] > 1} == set(lost)
    assert "Traceback" not in run.err.read_text()
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline")
