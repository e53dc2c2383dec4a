"""Trials whose ranks train on several hosts of a cluster (tests/helpers/hosts.py)."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.cluster_run import ClusterRun, processes
from tests.helpers.hosts import NEEDS_HOSTS, Host, Network
from tests.helpers.tiny_campaign import losses, records, train_all, write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_HOSTS]
PHASES = "\n  - name: alpha\n    vary: {alpha: [0.4]}\n"
EVERY = 20  # steps between checkpoints
ONE_RANK = "resources: {cpus_per_trial: 1, workers: 2}"
TWO_RANKS = "resources: {cpus_per_trial: 2, workers: 1, ranks_per_trial: 2, strategy: ddp, across_nodes: true}"


def write(folder: Path, corpus: Path) -> Path:
    """A campaign of two trials on two ranks each, which may be on two nodes."""
    file = write_file(folder, corpus, phases=PHASES, seeds="[1]", steps=400, every=EVERY, log_every=EVERY)
    text = file.read_text()
    assert ONE_RANK in text
    file.write_text(text.replace(ONE_RANK, TWO_RANKS))
    return file


def rank_on(host: Host) -> int:
    """The process of the rank on a host; 0 if there is none."""
    return next(iter(processes(host, " rank ")), 0)


@pytest.mark.long
def test_ranks_on_two_hosts_of_which_one_dies_end_with_the_numbers_of_one_host(tmp_path: Path, corpus: Path) -> None:
    """A rank is stopped before its host dies, so that the trial is in the middle on any machine."""
    file = write(tmp_path, corpus)
    with Network() as network:
        one, two = network.cluster("one", "two")
        run = ClusterRun(one, file, tmp_path / "out")
        trial, _ = run.until(lambda: next((now for host in (one, two) if (now := run.training(host))), None))
        run.until(lambda: (beat := run.training_of(trial)) and beat.step > EVERY)
        os.kill(run.until(lambda: rank_on(one) and rank_on(two)), signal.SIGSTOP)
        (three := network.host("three")).start_ray(head=one)
        two.down()
        again = run.until(lambda: (beat := run.training_of(trial)) and beat.began and beat)
        run.until(lambda: rank_on(one) and rank_on(three))
        run.finish()
    assert again.began % EVERY == 0
    assert {(event["cause"], event["trial_id"]) for event in run.events("worker_died")} == {("node_lost", trial)}
    assert [event["trial_id"] for event in run.events("trial_finished") if event["attempt"] > 1] == [trial]
    assert {record["provenance"]["ranks"] for record in records(run.root)} == {2}
    assert "Traceback" not in run.err.read_text()
    train_all(file, tmp_path / "inline")  # undisturbed, on one host
    assert losses(run.root) == losses(tmp_path / "inline")
