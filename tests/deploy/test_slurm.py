"""deploy/slurm on a real Slurm with two nodes on this machine."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import ROOT
from tests.helpers.slurm import Slurm, why_no_slurm
from tests.helpers.tiny_campaign import losses, train_all, write_file
from tune.storage.journal import read_journal

PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Slurm]:
    if reason := why_no_slurm():
        pytest.skip(reason)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    with Slurm() as running:
        yield running


def ray_nodes(slurm: Slurm) -> set[str]:
    """The nodes of Slurm on which Ray runs."""
    nodes = set()
    for process in slurm.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "raylet":
                nodes.add(process.environ()["SLURMD_NODENAME"])
    return nodes


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_job_on_two_nodes_that_is_requeued_ends_with_the_numbers_of_an_undisturbed_run(
    tmp_path: Path, corpus: Path, slurm: Slurm
) -> None:
    file = write_file(tmp_path, corpus, phases=PHASE, steps=150, every=50)
    train_all(file, tmp_path / "undisturbed")

    script, log, root = (
        ROOT / "deploy" / "slurm" / "campaign.sbatch",
        slurm.folder / "job.log",
        tmp_path / "out" / "tiny",
    )
    options = [f"--chdir={ROOT}", "--nodes=2", f"--output={log}", "--parsable"]
    job = slurm.call("sbatch", *options, str(script), str(file), "--out", str(root.parent)).strip()
    slurm.until(lambda: any(path.read_text().count("\n") > 2 for path in root.glob("trials/*/metrics.jsonl")))
    slurm.until(lambda: ray_nodes(slurm) == {"n1", "n2"})
    slurm.call("scancel", "--signal=USR1", "--batch", job)  # what `--signal` sends before the time is over
    slurm.until(lambda: slurm.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"))

    said = log.read_text()
    state = slurm.job(job)
    assert (state["JobState"], state["Restarts"], state["ExitCode"]) == ("COMPLETED", "1", "0:0"), said
    assert "Slurm will end it soon" in said and "interrupted; to resume" in said
    ends = [event["status"] for event in read_journal(root / "journal.jsonl") if event["event"] == "campaign_ended"]
    assert ends == ["interrupted", "finished"]
    assert losses(root) == losses(tmp_path / "undisturbed")
    assert ray_nodes(slurm) == set()
    assert list(slurm.folder.glob("ray-*")) == [], "Ray's files are removed on every node"
