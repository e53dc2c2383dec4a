"""The executor without Ray."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.fake_gpus import FakeGpus
from tests.helpers.tiny_campaign import begun, losses, records, session_on, train_all, write_file
from tune.executors.local import run_inline
from tune.machine import throughput as measured
from tune.session.executor_info import ExecutorLost
from tune.session.session import Session
from tune.storage.summaries import CampaignSummary
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("signals")


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    yield


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def run_with_signal(file: Path, root: Path, number: int, *, after: int) -> tuple[CampaignSummary, Session]:
    """A run that sends itself a signal during a trial, once `after` trials have finished."""
    with session_on(file, root) as session:
        begun(session)
        ask = session.ask

        def ask_and_interrupt() -> list[TrialSpec]:
            specs = ask()
            if specs and len(session.state.results) == after:
                os.kill(os.getpid(), number)
            return specs

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(session, "ask", ask_and_interrupt)
            run_inline(session)
        return session.end(), session


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after", [0, 3, 5])
def test_a_signal_stops_the_run_and_the_next_run_resumes_it(
    tmp_path: Path, file: Path, number: int, after: int
) -> None:
    train_all(file, tmp_path / "undisturbed")
    summary, session = run_with_signal(file, tmp_path / "tiny", number, after=after)
    assert (summary.status, session.stop_signal) == ("interrupted", number)
    assert len(session.state.results) == after
    summary = train_all(file, tmp_path / "tiny")
    assert summary.status == "finished"
    assert losses(tmp_path / "tiny") == losses(tmp_path / "undisturbed")


def test_a_complete_run_ends_as_finished(tmp_path: Path, file: Path) -> None:
    summary = train_all(file, tmp_path / "tiny")
    assert (summary.status, summary.trials.finished) == ("finished", 6)


def test_a_failed_trial_does_not_end_the_run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune.trials.trial

    opened = tune.trials.trial.open_cached_dataset
    broken = iter([True])

    def opened_sometimes(data):
        if next(broken, False):
            raise RuntimeError("no memory left")
        return opened(data)

    monkeypatch.setattr("tune.trials.trial.open_cached_dataset", opened_sometimes)
    file = write_file(tmp_path, corpus)
    summary = train_all(file, tmp_path / "tiny")
    assert (summary.status, summary.trials.failed, summary.trials.finished) == ("finished", 1, 5)
    assert "no memory left" in (summary.problems[0].error or "")
    assert train_all(file, tmp_path / "tiny").trials.failed == 0


# ---- trials that are trained together ------------------------------------------------------------------------------

ONE_PHASE = """
  - name: alpha
    vary: {alpha: [0.05, 0.1, 0.4]}
"""


def vectorised(file: Path, size: int = 4) -> Path:
    """The same campaign with groups of trials, in another file."""
    text = file.read_text()
    path = file.with_name("vectorised.yaml")
    path.write_text(text.replace("workers: 2}", f"workers: 2, vectorise: {size}}}"))
    assert path.read_text() != text
    return path


def close(first: Path, second: Path) -> bool:
    """Whether two campaigns have the same trials and losses, up to the rounding of batched products."""
    a, b = losses(first), losses(second)
    return a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], abs=1e-4) for name in a)


@pytest.mark.slow
def test_groups_give_the_same_verdicts_as_single_trials(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered: list[list[measured.SpeedRecord]] = []
    monkeypatch.setattr(measured, "_append", lambda records: remembered.append(list(records)))
    single = train_all(file, tmp_path / "single")
    together = train_all(vectorised(file), tmp_path / "together")
    assert close(tmp_path / "single", tmp_path / "together")
    for one, many in zip(single.phases, together.phases, strict=True):
        assert [(arm.arm, arm.verdict) for arm in one.arms] == [(arm.arm, arm.verdict) for arm in many.arms]
        assert one.winner == many.winner
    sizes = [record["provenance"].get("vectorised") for record in records(tmp_path / "together")]
    assert sorted(size for size in sizes if size) == [2] * 2 + [4] * 4 + [4] * 2, "the last two are of the first phase"
    assert [bool(speeds) for speeds in remembered] == [True, False], "the duration of a trial in a group is not its own"
    assert "its trials ran 2 and 4 at a time in a process" in "".join(together.phases[1].warnings)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 6, 11])
def test_a_stopped_group_resumes_each_trial_where_it_was(
    tmp_path: Path, corpus: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ngpt.system.heartbeat.CHECK_EVERY", 0.0)  # at every step
    file = vectorised(write_file(tmp_path, corpus, phases=ONE_PHASE, steps=9, every=3), size=3)
    train_all(file, tmp_path / "undisturbed")
    root, heard = tmp_path / "out", 0
    with session_on(file, root) as session:
        begun(session)
        should_stop = session.should_stop

        def listen(trial_id: str, interim: TrialResult) -> bool:
            nonlocal heard
            heard += 1
            if heard == after:
                os.kill(os.getpid(), signal.SIGINT)
            return should_stop(trial_id, interim)

        monkeypatch.setattr(session, "should_stop", listen)
        run_inline(session)
        under_way = list(session.state.running)
        assert session.end().status == "interrupted"
    assert len(under_way) == 3
    saved = {path.parents[1].name for path in root.glob("trials/*/checkpoints/step_*")}
    assert (saved >= set(under_way)) is (after > 3), "before the first step there is nothing to save"
    assert not list(root.glob("trials/*/stop")) and not list(root.glob("trials/*/heartbeat"))
    with session_on(file, root) as session:
        begun(session)
        again = session.ask()
        assert {spec.trial_id for spec in again} == set(under_way) and {spec.attempt for spec in again} == {2}
    assert train_all(file, root).status == "finished"
    assert close(root, tmp_path / "undisturbed")


@pytest.mark.slow
def test_early_stopping_ends_one_trial_of_a_group_and_the_others_continue(tmp_path: Path, corpus: Path) -> None:
    search = "{method: random, confirm: false, trials: 7, seed: 3, space: {optim.lr: {log: [1e-5, 1e-1]}}}"
    phases = f"\n  - name: find\n    search: {search}\nearly_stop: {{reduction: 2, first: 3}}\n"
    file = vectorised(write_file(tmp_path, corpus, phases=phases, seeds="[1]", steps=12, every=3))
    assert train_all(file, tmp_path / "out").status == "finished"
    ended = records(tmp_path / "out")
    steps = {
        status: {r["metrics"]["steps"] for r in ended if r["status"] == status} for status in ("stopped", "finished")
    }
    assert len(ended) == 8 and steps["finished"] == {12} and steps["stopped"] and steps["stopped"] <= {3, 6}
    assert {record["provenance"]["vectorised"] for record in ended} == {4}
    assert all("fell behind" in record["error"] for record in ended if record["status"] == "stopped")


def test_a_diverged_trial_does_not_affect_the_others_of_its_group(tmp_path: Path, corpus: Path) -> None:
    runs = "[{arm: sane}, {arm: wild, optim.lr: 1e30, optim.grad_clip: null}, {arm: low, lr: 1e-3}]"
    phases = f"\n  - name: lr\n    runs: {runs}\n"
    file = write_file(tmp_path, corpus, phases=phases, seeds="[1]")
    train_all(file, tmp_path / "single")
    train_all(vectorised(file), tmp_path / "together")
    single, together = ({r["arm"]: r for r in records(tmp_path / name)} for name in ("single", "together"))
    assert {name: r["status"] for name, r in together.items()} == {name: r["status"] for name, r in single.items()}
    assert [name for name, record in together.items() if record["status"] == "diverged"] == ["wild"]
    for name in single.keys() - {"wild"}:
        assert together[name]["metrics"]["val_loss"] == pytest.approx(single[name]["metrics"]["val_loss"], abs=1e-4)
        assert together[name]["provenance"]["vectorised"] == len(single)


def test_a_run_ends_once_its_process_cannot_use_the_gpu_any_more(
    tmp_path: Path, corpus: Path, fake_gpus: Callable[..., FakeGpus]
) -> None:
    """Every later trial would fail for a reason that is not its own."""
    fake_gpus(count=1, fault_width=16)
    file = write_file(tmp_path, corpus)
    file.write_text(file.read_text().replace("device: cpu", "device: auto"))
    with session_on(file, tmp_path / "tiny") as session:
        with pytest.raises(ExecutorLost, match="this process cannot use it any more; run the same command again"):
            run_inline(begun(session))
        (result,) = session.state.results.values()
    assert (result["status"], result["cause"]) == ("failed", "code_error")
    assert "device-side assert" in result["error"]
