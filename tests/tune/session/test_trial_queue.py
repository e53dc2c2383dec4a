"""The queue chooses which trials start, which start together in one process, and which must run alone."""

from pathlib import Path

import pytest

from ngpt.system.heartbeat import HeartbeatWriter
from tests.helpers.tiny_campaign import begun, next_trial, pretend, session_on, write_file
from tune.storage.journal import read_journal

pytestmark = pytest.mark.usefixtures("no_report")


def test_a_trial_is_retried_once_alone_after_the_machine_ran_out_of_memory(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        begun(session)
        first, second = next_trial(session), next_trial(session)
        assert first and second
        session.worker_died(first.trial_id, "host_oom")
        assert next_trial(session) is None, "the second one still runs"
        session.tell(second.trial_id, pretend(second))
        alone = next_trial(session)
        assert alone and alone.trial_id == first.trial_id
        assert next_trial(session) is None, "it runs alone"
        session.worker_died(first.trial_id, "host_oom")
        result = session.state.results[first.trial_id]
        assert (result["status"], result["cause"]) == ("failed", "host_oom")
        assert (
            result["error"]
            == "host_oom: the machine had no memory left, 2 times, the last time as the only running trial"
        )
        assert next_trial(session) and next_trial(session), "then two run at a time again"


@pytest.fixture
def together(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, vectorise=3)


def test_without_vectorise_every_group_is_a_single_trial(root: Path, file: Path) -> None:
    with session_on(file, root) as session:
        assert [len(begun(session).ask()) for _ in range(4)] == [1] * 4
        assert session.ask() == []


def test_a_group_holds_the_next_trial_and_those_after_it_with_the_same_graph(
    tmp_path: Path, corpus: Path, root: Path
) -> None:
    phases = "\n  - name: a\n    vary: {alpha: [0.1, 0.2, 0.3], batch_size: [8]}\n"
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1]", vectorise=3), root) as session:
        groups = [begun(session).ask(), session.ask(), session.ask()]
        assert [sorted(spec.config.batch_size for spec in group) for group in groups] == [[4, 4, 4], [4], [8]]
        started = [e["trial_id"] for e in read_journal(root / "journal.jsonl") if e["event"] == "trial_started"]
        assert started == [spec.trial_id for group in groups for spec in group] == list(session.state.running)


def test_waiting_trials_are_divided_among_the_workers(tmp_path: Path, corpus: Path, root: Path) -> None:
    phases = "\n  - name: a\n    vary: {alpha: [0.1, 0.2, 0.3]}\n"
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1, 2]", vectorise=8), root) as session:
        begun(session, workers=3)
        assert [len(session.ask()) for _ in range(4)] == [3, 3, 2, 0]


@pytest.mark.parametrize(("step", "sizes"), [(2, [3, 3, 2]), (3, [3, 3, 1])])
def test_a_worker_that_is_soon_free_gets_its_share(
    tmp_path: Path, corpus: Path, root: Path, step: int, sizes: list[int]
) -> None:
    phases = "\n  - name: a\n    vary: {alpha: [0.1, 0.2, 0.3]}\n"
    with session_on(write_file(tmp_path, corpus, phases=phases, seeds="[1, 2]", vectorise=3), root) as session:
        begun(session, workers=2)
        found = [session.ask(), session.ask()]
        for spec in found[0]:
            session.tell(spec.trial_id, pretend(spec))
        for spec in found[1]:
            spec.folder.mkdir(parents=True)
            HeartbeatWriter(spec.folder, began=step).close()  # of 6
        assert [len(group) for group in (*found, session.ask())] == sizes


def test_a_budget_counts_every_trial_of_a_group(root: Path, together: Path) -> None:
    together.write_text(together.read_text() + "budget: {trials: 2}\n")
    with session_on(together, root) as session:
        assert len(begun(session).ask()) == 2
        assert session.ask() == []


def test_trials_of_a_group_whose_worker_died_are_retried_one_by_one(root: Path, together: Path) -> None:
    with session_on(together, root) as session:
        group = begun(session).ask()
        for spec in reversed(group):
            session.worker_died(spec.trial_id, "killed")
        again = [session.ask() for _ in group]
        assert [[spec.trial_id for spec in specs] for specs in again] == [[spec.trial_id] for spec in group]
        assert {spec.attempt for (spec,) in again} == {2}
