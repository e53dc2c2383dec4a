"""Trials on two ranks without Ray: the same numbers and texts as on one, and what a killed rank or a signal changes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ngpt.downstream.bundle import read_bundle
from ngpt.downstream.core import evaluate_core
from ngpt.downstream.evaluate import core_scores
from ngpt.generate import generate
from ngpt.training.load_model import load_model
from ngpt.training.sample import SAMPLE_FILE
from tests.helpers.core_bundle import write_bundle
from tests.helpers.tiny_campaign import begun, losses, records, session_on, train_all, write_file
from tune.executors.local import run_inline
from tune.session.session import Session

SAMPLE_TOKENS = 40
PHASES = "\n  - name: alpha\n    vary: {alpha: [0.4]}\n"
ONE_RANK = "resources: {cpus_per_trial: 1, workers: 2}"
pytestmark = [pytest.mark.usefixtures("signals"), pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    yield


def write(folder: Path, corpus: Path, *, ranks: str = "", steps: int = 6) -> Path:
    folder.mkdir()
    file = write_file(folder, corpus, phases=PHASES, seeds="[1]", steps=steps)
    text = file.read_text().replace("tracker: {", f"tracker: {{sample_tokens: {SAMPLE_TOKENS}, ")
    evaluation = f"evaluation: {{core: {write_bundle(folder / 'bundle')}, limit: 4}}"
    text = text.replace("seeds: [1]\n", f"seeds: [1]\n{evaluation}\n", 1)
    assert ONE_RANK in text
    file.write_text(text.replace(ONE_RANK, f"resources: {{cpus_per_trial: 2, {ranks}}}") if ranks else text)
    return file


def texts(root: Path) -> dict[str, str]:
    """The sample text of each trial."""
    return {path.parent.name: path.read_text() for path in root.glob(f"trials/*/{SAMPLE_FILE}")}


def scores(root: Path) -> dict[str, dict[str, float]]:
    """The scores of each trial on its downstream tasks."""
    found = {record["trial_id"]: record["metrics"].items() for record in records(root)}
    return {trial: {name: value for name, value in every if name.startswith("core")} for trial, every in found.items()}


@pytest.mark.slow
def test_two_ranks_give_the_trials_of_one(tmp_path: Path, corpus: Path) -> None:
    train_all(write(tmp_path / "one", corpus), tmp_path / "one/tiny")
    summary = train_all(write(tmp_path / "two", corpus, ranks="ranks_per_trial: 2"), tmp_path / "two/tiny")
    assert summary.status == "finished"
    alone, together = losses(tmp_path / "one/tiny"), losses(tmp_path / "two/tiny")
    assert alone.keys() == together.keys() and len(alone) == 2
    for trial, numbers in alone.items():
        assert together[trial] == pytest.approx(numbers, abs=1e-5)
    assert texts(tmp_path / "two/tiny") == texts(tmp_path / "one/tiny") and len(texts(tmp_path / "one/tiny")) == 2
    assert scores(tmp_path / "two/tiny") == scores(tmp_path / "one/tiny")
    facts = [record["provenance"] for record in records(tmp_path / "two/tiny")]
    assert [(each["ranks"], each["threads"]) for each in facts] == [(2, 1)] * 2
    assert len({each["pid"] for each in facts}) == 1  # the ranks stay for the next trial
    assert psutil.Process().pid not in {each["pid"] for each in facts}
    assert not any(psutil.pid_exists(each["pid"]) for each in facts)


@pytest.mark.slow
def test_a_hung_rank_a_killed_one_and_a_signal_change_no_number(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "two", corpus, ranks="ranks_per_trial: 2, strategy: fsdp", steps=30)
    train_all(file, tmp_path / "undisturbed")
    file.write_text(file.read_text().replace("ranks_per_trial", "stall_timeout: 8, ranks_per_trial"))
    disturbances = {3: signal.SIGSTOP, 6: signal.SIGKILL, 9: signal.SIGTERM}  # by evaluation
    seen = []

    def disturb(session: Session) -> bool:
        seen.append(1)
        number = disturbances.get(len(seen))
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
        elif number:
            (other,) = {each.pid for each in ranks()} - {first_rank(session)}
            os.kill(other, number)
        return False

    with session_on(file, tmp_path / "tiny") as session:
        begun(session)
        with monkeypatch.context() as patch:
            patch.setattr(session, "should_stop", lambda *_: disturb(session))
            run_inline(session)
        assert session.end().status == "interrupted"
        deaths = [event["cause"] for event in session.journal.events if event["event"] == "worker_died"]
    assert deaths == ["hung", "killed"]
    assert ranks() == []
    assert train_all(file, tmp_path / "tiny").status == "finished"
    assert losses(tmp_path / "tiny") == losses(tmp_path / "undisturbed")
    bundle = read_bundle(tmp_path / "two/bundle", limit=4)
    for trial_id, text in texts(tmp_path / "tiny").items():
        loaded = load_model(tmp_path / "tiny/trials" / trial_id)  # whole, on one device
        assert text == generate(loaded, max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=0)
        assert scores(tmp_path / "tiny")[trial_id] == core_scores(evaluate_core(loaded, bundle))


def ranks() -> list[psutil.Process]:
    """The processes of ranks, besides Python's resource tracker."""
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def first_rank(session: Session) -> int:
    """The process of the first rank of the trial that is training."""
    ((_, beat),) = session.heartbeats().values()
    assert beat is not None
    return beat.pid
