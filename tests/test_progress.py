"""A plan in the light of the journal: what it knows replaces what a plan had to guess."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_campaign import begun, drive, session_on, write_file

from tune.campaign import load_campaign
from tune.journal import read_journal
from tune.plan import preview
from tune.progress import expected_phases, has_result, known_end, planned_event
from tune.schema import EarlyStop
from tune.state import State, replay

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def after(file: Path, root: Path, *, most: int) -> State:
    """What the journal says after so many trials; the longer alpha wins."""
    with session_on(file, root) as session:
        drive(begun(session), most=most)
    return replay(read_journal(root / "journal.jsonl"))


def test_a_planned_phase_is_read_back_as_it_was_written(file: Path) -> None:
    (phase, _) = preview(load_campaign(file))
    written = json.loads(json.dumps(planned_event(phase)))
    event = {"event": "phase_planned", "time": "2026-11-21T10:00:00.000+00:00", **written}
    read = replay([event]).phases["alpha"]
    assert sorted(read.trial_ids) == sorted(trial.trial_id for trial in phase.trials)
    assert (read.baseline, read.seeds, dict(read.swept)) == ("alpha=0.05", [1, 2], {"model.alpha": [0.05, 0.4]})
    assert [(arm.name, arm.overrides) for arm in read.arms] == [(arm.name, arm.overrides) for arm in phase.arms]


def test_before_anything_has_run_the_plan_is_the_preview(file: Path) -> None:
    campaign = load_campaign(file)
    assert expected_phases(campaign, State()) == preview(campaign)
    assert [known_end(campaign, State(), phase) for phase in preview(campaign)] == [None, None]


def test_a_winner_that_is_known_takes_the_place_of_the_one_that_stood_in(tmp_path: Path, file: Path) -> None:
    state, campaign = after(file, tmp_path / "r", most=4), load_campaign(file)
    first, second = expected_phases(campaign, state)
    end = known_end(campaign, state, first)
    assert end and (end[0], list(end[1])) == ("alpha=0.4", state.phases["alpha"].better)
    assert second.base == {"model.alpha": 0.4} and known_end(campaign, state, second) is None


def test_a_phase_that_has_changed_since_has_no_winner(tmp_path: Path, file: Path) -> None:
    state = after(file, tmp_path / "r", most=4)
    file.write_text(file.read_text().replace("[0.05, 0.4]", "[0.05, 0.3]"))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    assert known_end(campaign, state, first) is None and second.base == {"model.alpha": 0.3}


def test_who_wins_is_judged_by_the_rules_of_now(tmp_path: Path, file: Path) -> None:
    state = after(file, tmp_path / "r", most=4)
    file.write_text(file.read_text().replace("seeds:", "min_effect: 3\nseeds:"))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    assert known_end(campaign, state, first) == ("alpha=0.05", []) and second.base == {"model.alpha": 0.05}


def test_the_winner_of_last_time_stands_in_while_a_seed_that_was_added_is_trained(tmp_path: Path, file: Path) -> None:
    file.write_text(file.read_text().replace("[0.05, 0.4]", "[0.05, 0.2, 0.4]"))
    state = after(file, tmp_path / "r", most=6)
    file.write_text(file.read_text().replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    assert known_end(campaign, state, first) is None and second.base == {"model.alpha": 0.4}


def test_what_was_stopped_early_is_to_be_trained_where_that_is_not_done(tmp_path: Path, file: Path) -> None:
    state, campaign = after(file, tmp_path / "r", most=4), load_campaign(file)
    trial_id = next(iter(state.results))
    assert has_result(campaign, state, "alpha", trial_id)
    state.results[trial_id] = state.results[trial_id] | {"status": "stopped"}
    assert not has_result(campaign, state, "alpha", trial_id)
    searching = replace(campaign.phases[0], stops_early=True)
    campaign = replace(campaign, phases=(searching, campaign.phases[1]), early_stop=EarlyStop(first=3))
    assert has_result(campaign, state, "alpha", trial_id) and not has_result(campaign, state, "projection", trial_id)
