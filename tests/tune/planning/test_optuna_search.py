"""Optuna's proposals depend on the scores only, so a resumed campaign repeats them."""

import math
import sys
from pathlib import Path

import pytest

from ngpt.config.base import ConfigError
from tests.helpers.tiny_campaign import begun, drive, next_trial, records, session_on, strict, write_file
from tune.campaign import load_campaign
from tune.machine.estimate import estimate
from tune.planning.optuna_search import arm_score, propose_arms
from tune.planning.smoke import shrink_campaign
from tune.spec.search_space import Dimension, Search

PHASES = """
  - name: tpe
    search:
      method: optuna
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
