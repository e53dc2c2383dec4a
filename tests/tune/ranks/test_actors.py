"""Campaigns on Ray whose trials train on two ranks each: what survives a rank, its worker and the run."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.real_run import Run, left_over, start
from tests.helpers.tiny_campaign import losses, records, train_all, write_file

PHASES = "\n  - name: alpha\n    vary: {alpha: [0.4]}\n"
ONE_RANK = "resources: {cpus_per_trial: 1, workers: 2}"
TWO_RANKS = "resources: {cpus_per_trial: 2, workers: 1, ranks_per_trial: 2, strategy: STRATEGY}"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def campaign(folder: Path, corpus: Path, *, strategy: str | None) -> Path:
    """A campaign of two trials, on two ranks or (without a strategy) on one."""
    folder.mkdir()
    checkpoint = "{every: 10}"
    file = write_file(
        folder, corpus, phases=PHASES, seeds="[1]", steps=150, every=75, checkpoint=checkpoint, log_every=50
    )
    if strategy:
        text = file.read_text()
        assert ONE_RANK in text
        file.write_text(text.replace(ONE_RANK, TWO_RANKS.replace("STRATEGY", strategy)))
    return file


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    yield


def progress(run: Run) -> tuple[int, int]:
    """The steps that a trial has made, in this attempt and in all."""
    beats = run.beats().values()
    return max(((beat["step"] - beat["began"], beat["step"]) for beat in beats), default=(0, 0))


def processes(run: Run, title: Callable[[str], bool]) -> list[psutil.Process]:
    found = []
    for child in run.family():
        try:
            if title(" ".join(child.cmdline())):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def ranks(run: Run) -> list[psutil.Process]:
    found = processes(run, lambda title: " seed " in title and " rank " in title)
    return sorted(found, key=lambda process: process.cmdline())


def workers(run: Run) -> list[psutil.Process]:
    return processes(run, lambda title: " seed " in title and " rank " not in title)


def test_a_campaign_survives_the_death_of_a_rank_a_worker_and_the_run(tmp_path: Path, corpus: Path) -> None:
    alone = campaign(tmp_path / "alone", corpus, strategy=None)
    train_all(alone, tmp_path / "alone/tiny")
    file = campaign(tmp_path / "two", corpus, strategy="ddp")
    train_all(file, tmp_path / "two/inline")  # undisturbed

    run = start(file, tmp_path / "ray")
    victims: list[list[psutil.Process]] = []

    def has_two_ranks_that_train() -> bool:
        return len(ranks(run)) == 2 and progress(run)[0] > 5 and progress(run)[1] > 20 * (1 + len(victims))

    try:
        for choose in (lambda: ranks(run)[1], lambda: workers(run)[0]):
            run.until(has_two_ranks_that_train)
            victims.append(ranks(run) + workers(run))
            choose().kill()
            run.until(lambda: len(run.events("worker_died")) == len(victims))
            assert left_over(victims[-1]) == []
        run.until(has_two_ranks_that_train)
        family = run.family()
        run.process.kill()
        run.process.wait()
        assert left_over(family) == []
        run = start(file, tmp_path / "ray")
        assert run.wait() == 0, run.err.read_text()
    finally:
        run.end()
    assert "Traceback" not in run.err.read_text()
    assert [event["cause"] for event in run.events("worker_died")] == ["killed", "killed"]
    assert losses(run.root) == losses(tmp_path / "two/inline")
    assert_equal(losses(run.root), losses(tmp_path / "alone/tiny"))
    assert {record["provenance"]["ranks"] for record in records(run.root)} == {2}


def assert_equal(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    """Of the same trials, within the 1e-5 that the ranks promise."""
    assert found.keys() == expected.keys()
    for trial, numbers in expected.items():
        assert found[trial] == pytest.approx(numbers, abs=1e-5)
