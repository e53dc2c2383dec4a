"""A results folder that not all nodes share is refused before the first trial, by the name of each such node."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hosts import NEEDS_HOSTS, PORT, ROOT, Network, cluster
from tests.helpers.object_store import environment, make_bucket, s3_server
from tests.helpers.tiny_campaign import records, write_file


@pytest.mark.slow
@pytest.mark.timeout(600)
@NEEDS_HOSTS
def test_a_folder_that_a_node_does_not_share_is_refused_by_its_name(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results at an address are uploaded by the run alone if all nodes share its cache: they need no credentials."""
    file, own = write_file(tmp_path, corpus), tmp_path / "own"
    with cluster("one", "two", private=[own]) as (head, other):
        bridge = head.address.rpartition(".")[0] + ".1"

        def run(out: Path | str) -> Any:
            command = [sys.executable, ROOT / "run_campaign.py", file, "--address", f"{head.address}:{PORT}"]
            return head.run([*command, "--out", out], env=os.environ)

        in_folder = run(own / "results")
        left = head.run(["find", own, "-name", "trials", "-o", "-name", ".probe*", "-o", "-size", "+0", "-type", "f"])
        with s3_server(tmp_path, bridge) as port:
            for name, value in environment(port, bridge).items():
                monkeypatch.setenv(name, value)
            files = make_bucket("bucket")
            uploaded = run("s3://bucket/runs")
            report = files.get_file_info("bucket/runs/tiny/report.html")
    assert in_folder.returncode == 2, in_folder.stdout + in_folder.stderr
    (line,) = (line for line in in_folder.stderr.splitlines() if f"{own}/" in line)
    assert f"node two ({other.address}) does not see what this run writes there" in line
    assert "node one" not in line
    assert "give --out a folder that all nodes share" in line
    assert "Traceback" not in in_folder.stderr
    assert left.stdout == ""
    assert uploaded.returncode == 0, uploaded.stdout + uploaded.stderr
    assert report.size > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@NEEDS_HOSTS
def test_a_node_that_joins_without_the_folder_gets_no_trials(tmp_path: Path, corpus: Path) -> None:
    file, out, log = write_file(tmp_path, corpus), tmp_path / "results", tmp_path / "log"
    with Network() as network:
        (head,) = network.cluster("one")
        command = [sys.executable, ROOT / "run_campaign.py", file, "--address", f"{head.address}:{PORT}", "--out", out]
        with log.open("w") as stream:
            run = head.start(command, stdout=stream, stderr=stream)

        def until(happened: Callable[[], Any]) -> Any:
            deadline = time.monotonic() + 240
            while not (found := happened()):
                assert run.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            return found

        (worker, *_) = until(lambda: [pid for pid in head.pids() if " seed " in title(pid)])
        os.kill(worker, signal.SIGSTOP)  # so that the campaign is not over before the node has joined
        other = network.host("two", private=[out])
        other.start_ray(head=head)
        until(lambda: "is not used" in log.read_text())
        os.kill(worker, signal.SIGCONT)
        assert run.wait(240) == 0, log.read_text()
    refusal = f"two ({other.address}) is not used: does not see what this run writes there"
    assert refusal in log.read_text()
    assert {record["provenance"]["host"] for record in records(out / "tiny")} == {"one"}


def title(pid: int) -> str:
    """The title of a process, which names the trial of a worker; empty once it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
