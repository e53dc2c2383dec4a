"""A budget stops a campaign between trials and counts the trials left out; a larger one resumes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import run_campaign
from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, records, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.machine.estimate import EFFICIENCY, check_budget
from tune.planning.budget import STOPPED_BY_BUDGET, budget_allows, describe_budget, left_out_sentence
from tune.results.summary import read_state
from tune.session.session import Session
from tune.spec.schema import Budget
from tune.storage.journal import read_journal
from tune.storage.state import CampaignState, replay

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves: `clock.now`, in seconds."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tune.session.session.time.monotonic", lambda: clock.now)
    return clock


def with_budget(folder: Path, corpus: Path, budget: str) -> Path:
    """A campaign of 4 trials in its first phase and, with its winner, 2 more in the second."""
    path = write_file(folder, corpus)
    path.write_text(path.read_text() + f"budget: {budget}\n")
    return path


def run(file: Path, root: Path) -> tuple[list[str], Session]:
    """Runs one session to its end; returns the trials that it started."""
    with session_on(file, root) as session:
        given_out = drive(begun(session))
        session.end()
    return [spec.trial_id for spec in given_out], session


# ---- trials --------------------------------------------------------------------------------------------------------


def test_no_trial_starts_above_the_budget_and_the_summary_counts_the_ones_left_out(
    tmp_path: Path, corpus: Path
) -> None:
    trained, session = run(with_budget(tmp_path, corpus, "{trials: 3}"), tmp_path / "r")
    assert len(trained) == 3
    assert session.is_over() and session.state.status == STOPPED_BY_BUDGET
    summary = strict((tmp_path / "r/summary.json").read_text())
    assert (summary["status"], summary["left_out"]) == (STOPPED_BY_BUDGET, {"alpha": 1, "projection": 2})
    assert summary["warnings"][-1] == "the budget was reached: left out 1 trial of alpha, 2 trials of projection"
    assert summary["answer"]["winner"] is None


def test_a_budget_equal_to_the_number_of_trials_stops_nothing(tmp_path: Path, corpus: Path) -> None:
    trained, session = run(with_budget(tmp_path, corpus, "{trials: 6, hours: 1}"), tmp_path / "r")
    assert (len(trained), session.state.status, session.state.left_out) == (6, "finished", {})


@pytest.mark.slow
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(budgets=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_growing_budgets_train_the_same_trials_as_one_large_budget(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, budgets: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("budgets")
    trained: list[str] = []
    for most in (*sorted(budgets), 100):
        new, _ = run(with_budget(folder, corpus, f"{{trials: {most}}}"), folder / "pieces")
        trained += new
        assert len(trained) <= most
    whole, _ = run(with_budget(folder, corpus, "{hours: 1}"), folder / "whole")
    assert trained == whole
    assert [(r["phase"], r["trial_id"], r["metrics"]) for r in records(folder / "pieces")] == [
        (r["phase"], r["trial_id"], r["metrics"]) for r in records(folder / "whole")
    ]


def test_an_interrupted_trial_is_finished_first_and_counts_once(tmp_path: Path, corpus: Path) -> None:
    file = with_budget(tmp_path, corpus, "{trials: 2}")
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        first, second = next_trial(session), next_trial(session)
        assert first and second and next_trial(session) is None
        assert not session.is_over()  # they are running
        session.tell(second.trial_id, pretend(second))
    trained, session = run(file, tmp_path / "r")
    assert trained == [first.trial_id]
    assert session.state.status == STOPPED_BY_BUDGET
    with session_on(file, tmp_path / "r") as again:
        assert not again.has_work()


def test_a_trial_is_retried_after_its_worker_dies_even_if_the_budget_is_used_up(
    tmp_path: Path, corpus: Path, clock: SimpleNamespace
) -> None:
    with session_on(with_budget(tmp_path, corpus, "{hours: 1}"), tmp_path / "r") as session:
        begun(session)
        spec = next_trial(session)
        assert spec
        clock.now = 3601.0
        assert next_trial(session) is None and not session.is_over()
        session.worker_died(spec.trial_id, "killed")
        assert not session.is_over()
        again = next_trial(session)
        assert again and again.trial_id == spec.trial_id
        session.tell(spec.trial_id, pretend(spec))
        assert session.is_over() and next_trial(session) is None


# ---- hours ---------------------------------------------------------------------------------------------------------


def test_hours_count_over_all_sessions(tmp_path: Path, corpus: Path, clock: SimpleNamespace) -> None:
    file = with_budget(tmp_path, corpus, "{hours: 2}")

    def half_an_hour(spec):
        clock.now += 1800.0
        return pretend(spec)

    with session_on(file, tmp_path / "r") as session:
        assert len(drive(begun(session), half_an_hour, most=1)) == 1
        session.stop_requested = True
        session.end()
    assert read_state(tmp_path / "r").status == "interrupted"
    clock.now += 1e6  # time between sessions does not count
    with session_on(file, tmp_path / "r") as session:
        assert len(drive(begun(session), half_an_hour)) == 3
        session.end()
    assert read_state(tmp_path / "r").status == STOPPED_BY_BUDGET
    assert read_state(tmp_path / "r").left_out == {"projection": 2}
    assert replay(read_journal(tmp_path / "r/journal.jsonl")).seconds == 7200.0
    with session_on(file, tmp_path / "r") as session:
        assert not session.has_work()


def test_hours_too_few_for_one_trial_are_refused_before_anything_is_written(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))  # without speeds measured by other tests
    monkeypatch.setattr("tune.machine.estimate.gemm_flops", lambda *_: 1e6 / EFFICIENCY)
    file = with_budget(tmp_path, corpus, "{hours: 1e-3}")
    assert run_campaign.main([str(file), "--inline", "--out", str(tmp_path / "r")]) == 2
    message = capsys.readouterr().err
    # 6 steps of 64 tokens and 3 evaluations of 128; two blocks, a head of 400, attention over 16 tokens.
    flops = (6 * 64 + 3 * 128 / 3) * (6 * (2 * (4 * 16 * 16 + 3 * 16 * 32) + 400 * 16) + 2 * 12 * 16 * 16)
    assert message.startswith("budget.hours: 0.001 hours are 3.6 s, and one trial takes about ")
    assert f"give at least {(flops / 1e6 + 0.1) / 3600:.2g}, or shorten the trials" in message
    assert not (tmp_path / "r").exists()
    check_budget(load_campaign(with_budget(tmp_path, corpus, "{hours: 1}")), tmp_path / "r")


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "{trials: 0}",
            "budget.trials: input should be greater than or equal to 1, got 0; 1 to 1,000,000,000 is possible",
        ),
        ("{hours: 0}", "budget.hours: input should be greater than 0, got 0; above 0 to 1,000,000 is possible"),
        ("{houers: 1}", "budget.houers: unknown setting, did you mean 'hours'?"),
        ("3", "budget: must be a mapping of settings, got 3"),
    ],
)
def test_an_invalid_budget_is_refused(tmp_path: Path, corpus: Path, budget: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_campaign(with_budget(tmp_path, corpus, budget))
    assert str(caught.value).endswith(message)


# ---- the rule itself -----------------------------------------------------------------------------------------------


def test_without_a_budget_every_trial_may_start() -> None:
    assert budget_allows(Budget(), CampaignState(attempts={"a": 1}), "b", 1e12)
    assert (describe_budget(Budget()), describe_budget(Budget(trials=1, hours=2.5))) == ("", "1 trial, 2.5 hours")


def test_left_out_trials_are_counted_by_phase() -> None:
    assert left_out_sentence({"a": 1, "b": 3}) == "the budget was reached: left out 1 trial of a, 3 trials of b"


def test_a_campaign_stopped_by_its_budget_exits_with_code_4_and_resumes_with_a_larger_one(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--inline", "--out", str(tmp_path / "r")]
    assert run_campaign.main([str(with_budget(tmp_path, corpus, "{trials: 1}")), *arguments]) == 4
    out = capsys.readouterr().out
    assert "stopped by budget" in out and "Raise `budget:`" in out
    assert run_campaign.main([str(with_budget(tmp_path, corpus, "{trials: 50}")), *arguments]) == 0
    assert "stopped by budget" not in capsys.readouterr().out
