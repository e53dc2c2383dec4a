"""Optuna's proposals depend on the scores only, so a resumed campaign repeats them."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import write_atomic
from tests.helpers.tiny_campaign import begun, drive, next_trial, records, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.machine.estimate import estimate
from tune.planning import changes
from tune.planning.optuna_search import arm_score, propose_arms, reusable_arms
from tune.planning.smoke import shrink_campaign
from tune.spec.search_space import Dimension, Search
from tune.storage.journal import Journal, read_journal
from tune.storage.records import SearchRecord

PHASES = """
  - name: tpe
    search:
      method: optuna
      confirm: false
      trials: 7
      parallel: 3
      space: {alpha: {uniform: [0.05, 0.5]}, optim.lr: {log: [1e-3, 1e-1]}, batch_size: {choice: [3, 4]}}
  - name: after
    inherit: tpe
    vary: {project_every: [3]}
"""


pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus, phases=PHASES)


def run(file: Path, root: Path, *, most: int | None = None) -> list[str]:
    with session_on(file, root) as session:
        given_out = drive(begun(session), most=most)
        session.end()
    return [spec.trial_id for spec in given_out]


@pytest.mark.slow
def test_a_campaign_runs_batch_after_batch_and_resumes_to_the_same_arms(file: Path, tmp_path: Path) -> None:
    whole = run(file, tmp_path / "whole")
    summary = strict((tmp_path / "whole/tpe/summary.json").read_text())
    assert len(summary["arms"]) == 1 + 7
    assert len([r for r in records(tmp_path / "whole") if r["phase"] == "tpe"]) == 2 * 8
    assert strict((tmp_path / "whole/after/summary.json").read_text())["base"].keys() >= {"model.alpha"}
    for most in (1, 8, 9, 15):
        root = tmp_path / f"after-{most}"
        assert run(file, root, most=most) + run(file, root) == whole
        assert run(file, root) == []


def test_the_next_batch_waits_for_the_last_trial_of_the_previous_one(file: Path, tmp_path: Path) -> None:
    with session_on(file, tmp_path / "r") as session:
        begun(session)
        specs = []
        while (spec := next_trial(session)) is not None:
            specs.append(spec)
        assert len(specs) == 2 * (1 + 3)
        assert not session.is_over()


def test_a_plan_counts_the_arms_that_are_not_known_yet(file: Path, tmp_path: Path) -> None:
    rows = {row.phase: row for row in estimate(load_campaign(file), tmp_path / "r").phases}
    assert rows["tpe"].arms == 8


def test_a_smoke_run_draws_one_random_batch(file: Path) -> None:
    phase = shrink_campaign(load_campaign(file)).phases[0]
    assert (phase.search, len(phase.arms)) == (None, 3)


SEARCH = Search("optuna", 12, 0, 4, (Dimension("lr", "optim.lr", "log", (1e-4, 1e-1), ()),))


def test_proposals_of_complete_batches_do_not_change_with_later_scores() -> None:
    first = propose_arms(SEARCH, ())
    second = propose_arms(SEARCH, (1.0, 2.0, 0.5, math.inf))
    assert (len(first), len(second), second[:4]) == (4, 8, first)
    assert propose_arms(SEARCH, (1.0, 2.0, 0.5, math.inf, 3.0, 1.0, 1.0, 0.1))[:8] == second
    assert len(propose_arms(SEARCH, (1.0,) * 12)) == 12
    assert all(1e-4 <= arm.overrides["optim.lr"] <= 1e-1 for arm in second)


def test_proposals_follow_the_scores() -> None:
    search = Search("optuna", 60, 0, 4, SEARCH.space)
    scores: tuple[float, ...] = ()
    while len(arms := propose_arms(search, scores)) > len(scores):
        scores = tuple(abs(math.log10(arm.overrides["optim.lr"] / 1e-2)) for arm in arms)
    assert sum(scores[-20:]) < 0.6 * sum(scores[:10]) * 2  # in decades from the best; the first ten are random


def test_an_arm_is_scored_by_its_mean_and_ranks_last_without_all_seeds() -> None:
    assert arm_score([1.0, 2.0], "minimize") == 1.5
    assert arm_score([1.0, 2.0], "maximize") == -1.5
    assert arm_score([1.0, None], "maximize") == arm_score([None], "minimize") == math.inf


def test_the_message_without_optuna_has_the_install_command(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError) as caught:
        load_campaign(file)
    assert str(caught.value).endswith("the package optuna is not installed: pip install 'ngpt-campaign[search]'")
    assert ":18:7: phases[0].search.method: " in str(caught.value)


# ---- another version of optuna -------------------------------------------------------------------------------------


@pytest.fixture
def another_optuna(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes optuna propose other arms for the same seed, as another version of it does."""
    sampler = optuna.samplers.TPESampler
    monkeypatch.setattr(optuna.samplers, "TPESampler", lambda seed, **kw: sampler(seed=seed + 1000, **kw))
    monkeypatch.setattr(changes, "optuna_version", lambda: "99.0")
    propose_arms.cache_clear()
    yield
    propose_arms.cache_clear()


@pytest.mark.parametrize("journal", ["this version", "an older version"])
def test_arms_of_another_optuna_are_kept_and_none_is_dropped(
    file: Path, tmp_path: Path, journal: str, request: pytest.FixtureRequest
) -> None:
    root = tmp_path / "r"
    propose_arms.cache_clear()
    first = run(file, root, most=11)  # the first batch of 8 trials, and 3 of the second
    if journal == "an older version":
        drop_search(root / "journal.jsonl")
    request.getfixturevalue("another_optuna")
    with session_on(file, root) as session:
        lines = changes.find_changes(session.campaign, session.state).lines()
        more = [spec.trial_id for spec in drive(begun(session))]
        summary = session.end()
    expected = [f"optuna {optuna.__version__} -> 99.0: phase tpe keeps its 6 arms; new ones may differ"]
    assert lines == (expected if journal == "this version" else [])
    assert not set(first) & set(more)
    assert set(first) < {trial_id for arm in summary.phases[0].arms for trial_id in arm.trial_ids}
    assert len(summary.phases[0].arms) == 1 + 7
    assert summary.warnings == () or not any("no arm" in warning for warning in summary.warnings)
    assert run(file, root) == []  # the arms that the other version proposed are kept in turn


def drop_search(path: Path) -> None:
    """Rewrites a journal as a version wrote it that did not record searches."""
    events = read_journal(path)
    write_atomic(path, "")
    old = Journal(path)
    for event in events:
        fields = {name: value for name, value in event.items() if name not in ("seq", "time", "event", "search")}
        old.append(event["event"], **fields)
    old.close()


@pytest.mark.usefixtures("another_optuna")
def test_the_next_proposals_know_the_scores_of_the_given_arms() -> None:
    search = Search("optuna", 40, 0, 4, SEARCH.space)
    given = tuple((round(10 ** (-4 + 3 * i / 15), 6),) for i in range(16))
    scores = tuple(abs(math.log10(value / 1e-2)) for (value,) in given)
    arms = propose_arms(search, scores, given)
    assert [arm.overrides["optim.lr"] for arm in arms[:16]] == [value for (value,) in given]
    for _ in range(5):
        given = tuple((arm.overrides["optim.lr"],) for arm in arms)
        scores = tuple(abs(math.log10(value / 1e-2)) for (value,) in given)
        arms = propose_arms(search, scores, given)
    proposed = [abs(math.log10(arm.overrides["optim.lr"] / 1e-2)) for arm in arms[16:]]
    assert sum(proposed) / len(proposed) < 0.6  # a uniform draw from the space is 0.83 decades away on average


def test_a_search_with_another_question_starts_anew() -> None:
    record = SearchRecord([{"optim.lr": 1e-3}, {"optim.lr": 2e-2}], SEARCH.question, "5.0")
    assert reusable_arms(SEARCH, record) == ((1e-3,), (2e-2,))
    narrower = Search("optuna", 12, 0, 4, (Dimension("lr", "optim.lr", "log", (1e-4, 1e-2), ()),))
    assert reusable_arms(narrower, record) == ()
    assert reusable_arms(Search("optuna", 12, 1, 4, SEARCH.space), record) == ()
    assert reusable_arms(Search("optuna", 20, 0, 2, SEARCH.space), record) == ((1e-3,), (2e-2,))
    assert reusable_arms(narrower, SearchRecord(record.proposed)) == ((1e-3,),)
