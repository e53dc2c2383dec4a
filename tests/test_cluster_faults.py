"""Faults of a cluster: each ends in the numbers of an undisturbed run, or in one clear line."""

import importlib.util
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.cluster_run import ClusterRun, worker
from tests.helpers.hosts import NEEDS_HOSTS, Host, Network
from tests.helpers.tiny_campaign import losses, records, train_all, write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), NEEDS_HOSTS]
ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""
SHORT_CUT = 10  # seconds


def send(number: int, *hosts: Host) -> None:
    """Sends a signal to the worker of each host."""
    for host in hosts:
        os.kill(worker(host), number)


def test_a_node_with_a_broken_torch_is_set_aside_and_no_trial_is_charged(tmp_path: Path, corpus: Path) -> None:
    file, out = write_file(tmp_path, corpus), tmp_path / "out"
    (torch,) = importlib.util.find_spec("torch").submodule_search_locations  # type: ignore[union-attr]
    with Network() as network:
        head, bare = network.host("one"), network.host("two", private=[Path(torch)])
        head.start_ray()
        bare.start_ray(head=head)
        run = ClusterRun(head, file, out)
        run.finish()
    died = run.events("worker_died")
    ((cause, reason),) = {(event["cause"], event["reason"]) for event in died}
    assert cause == "cannot_start"
    assert re.match(r"(ModuleNotFound|Attribute)Error: .*'torch\b", reason)  # its folder is empty
    assert len(died) == 2 and {record["status"] for record in records(run.root)} == {"finished"}
    (line,) = [line for line in run.err.read_text().splitlines() if "is not used" in line]
    assert line.startswith(f"two ({bare.address}) is not used: workers cannot start there ({reason})")
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline")


@pytest.mark.long
def test_lost_networks_a_killed_run_and_a_lost_head_change_no_result(tmp_path: Path, corpus: Path) -> None:
    """Workers are stopped while the test waits, so that the trials do not end meanwhile."""
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1, 2]", steps=400, every=10)
    out = tmp_path / "out"
    with Network() as network:
        head, two, three = (network.host(name) for name in ("one", "two", "three"))
        head.start_ray(cpus=0)
        two.start_ray(head=head)
        three.start_ray(head=head)

        def both_train(run: ClusterRun) -> None:
            run.until(lambda: run.training(two) and run.training(three) and worker(two) and worker(three))

        run = ClusterRun(head, file, out, on=two)
        both_train(run)
        send(signal.SIGSTOP, two, three)
        at = run.training(three)
        three.cut()
        time.sleep(SHORT_CUT)
        three.mend()
        send(signal.SIGCONT, two, three)
        run.until(lambda: run.training(three) != at)
        assert run.events("worker_died") == []

        both_train(run)
        assert run.signal(signal.SIGKILL) != 0
        deadline = time.monotonic() + 60
        while worker(two) or worker(three):
            assert time.monotonic() < deadline, "Ray ends the workers of a run that is gone"
            time.sleep(0.1)

        run = ClusterRun(head, file, out, on=two)
        both_train(run)
        send(signal.SIGSTOP, two)
        three.cut()
        (died,) = run.until(lambda: run.events("worker_died"))
        assert died["cause"] == "node_lost"
        head.down()
        began = time.monotonic()
        assert run.process.wait(180) == 1
        print(f"lost after {time.monotonic() - began:.0f} s")
        *_, line = run.err.read_text().splitlines()
        assert "is lost" in line and "run the same command again to resume" in line
        assert "Traceback" not in run.err.read_text()

        new = network.host("four")
        new.start_ray(cpus=2)
        run = ClusterRun(new, file, out)
        run.finish()
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline")
