"""Workers on other hosts are stopped, saved and killed through Ray, also where their files are not seen."""

import os
import signal
from pathlib import Path

import pytest

from tests.helpers.cluster_run import ClusterRun, title, worker
from tests.helpers.hosts import NEEDS_HOSTS, Host, Network
from tests.helpers.tiny_campaign import losses, train_all, write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), NEEDS_HOSTS]
ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


def saved(host: Host, root: Path) -> dict[str, int]:
    """The newest checkpoint of every trial that a host sees."""
    found = host.run(["find", root / "trials", "-name", "step_*", "-printf", "%p\n"]).stdout.split()
    return {path.parents[1].name: int(path.name[5:]) for path in map(Path, sorted(found))}


@pytest.mark.long
def test_a_worker_on_another_host_is_killed_and_stopped_where_its_files_are_not_seen(
    tmp_path: Path, corpus: Path
) -> None:
    file = write_file(tmp_path, corpus, phases=ONE_PHASE, seeds="[1]", steps=600, every=5)
    file.write_text(file.read_text().replace("workers: 2}", "workers: 2, stall_timeout: 6}"))
    out = tmp_path / "out"
    with Network() as network:
        head, other = network.host("one"), network.host("two", private=[out / "tiny/trials"])
        head.start_ray()
        other.start_ray(head=head)
        run = ClusterRun(head, file, out)
        _, first = run.until(lambda: run.training(other))
        os.kill(hung := worker(other), signal.SIGSTOP)
        (died,) = run.until(lambda: run.events("worker_died"))
        assert died["cause"] == "hung" and died["step"] > 0
        trial, beat = run.until(lambda: (now := run.training(other)) and now[1].pid != first.pid and now)
        assert run.signal(signal.SIGINT) == 130, run.err.read_text()
        assert saved(other, run.root)[trial] >= beat.step
        assert not title(hung)
        run = ClusterRun(head, file, out)
        run.finish()
    train_all(file, tmp_path / "inline")
    assert losses(run.root) == losses(tmp_path / "inline")
