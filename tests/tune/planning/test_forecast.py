"""Planning with the results in the journal, which replace guesses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.tiny_campaign import begun, drive, session_on, write_file
from tune.campaign import load_campaign
from tune.planning.forecast import expected_phases, expected_stages, has_result, known_result, phase_planned_event
from tune.planning.plan import preview, trial_flops
from tune.spec.schema import EarlyStop
from tune.storage.journal import read_journal
from tune.storage.state import CampaignState, replay

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def file(tmp_path: Path, corpus: Path) -> Path:
    return write_file(tmp_path, corpus)


def after(file: Path, root: Path, *, most: int) -> CampaignState:
    """The state after `most` trials; the larger alpha wins."""
    with session_on(file, root) as session:
        drive(begun(session), most=most)
    return replay(read_journal(root / "journal.jsonl"))


def test_a_planned_phase_survives_the_round_trip_through_the_journal(file: Path) -> None:
    (phase, _) = preview(load_campaign(file))
    written = json.loads(json.dumps(phase_planned_event(phase)))
    event = {"event": "phase_planned", "time": "2026-11-21T10:00:00.000+00:00", **written}
    read = replay([event]).phases["alpha"]
    assert sorted(read.trial_ids) == sorted(trial.trial_id for trial in phase.trials)
    assert (read.baseline, read.seeds, dict(read.swept)) == ("alpha=0.05", [1, 2], {"model.alpha": [0.05, 0.4]})
    assert [(arm.name, arm.overrides) for arm in read.arms] == [(arm.name, arm.overrides) for arm in phase.arms]


def test_the_plan_equals_the_preview_before_anything_has_run(file: Path) -> None:
    campaign = load_campaign(file)
    assert expected_phases(campaign, CampaignState()) == preview(campaign)
    assert [known_result(campaign, CampaignState(), phase) for phase in preview(campaign)] == [None, None]


def test_a_known_winner_replaces_the_guessed_one(tmp_path: Path, file: Path) -> None:
    state, campaign = after(file, tmp_path / "r", most=4), load_campaign(file)
    first, second = expected_phases(campaign, state)
    end = known_result(campaign, state, first)
    assert end and (end[0], list(end[1])) == ("alpha=0.4", state.phases["alpha"].better)
    assert second.base == {"model.alpha": 0.4} and known_result(campaign, state, second) is None


def test_a_phase_that_has_changed_has_no_winner(tmp_path: Path, file: Path) -> None:
    state = after(file, tmp_path / "r", most=4)
    file.write_text(file.read_text().replace("[0.05, 0.4]", "[0.05, 0.3]"))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    assert known_result(campaign, state, first) is None and second.base == {"model.alpha": 0.3}


def test_the_winner_is_judged_by_the_present_rules(tmp_path: Path, file: Path) -> None:
    state = after(file, tmp_path / "r", most=4)
    file.write_text(file.read_text().replace("seeds:", "min_effect: 3\nseeds:", 1))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    result = known_result(campaign, state, first)
    assert result and (result.winner, result.better) == ("alpha=0.05", []) and second.base == {"model.alpha": 0.05}


def test_the_last_winner_is_assumed_while_an_added_seed_is_trained(tmp_path: Path, file: Path) -> None:
    file.write_text(file.read_text().replace("[0.05, 0.4]", "[0.05, 0.2, 0.4]"))
    state = after(file, tmp_path / "r", most=6)
    file.write_text(file.read_text().replace("seeds: [1, 2]", "seeds: [1, 2, 3]"))
    campaign = load_campaign(file)
    first, second = expected_phases(campaign, state)
    assert known_result(campaign, state, first) is None and second.base == {"model.alpha": 0.4}


def test_a_trial_that_was_stopped_early_is_trained_by_a_phase_that_does_not_stop_early(
    tmp_path: Path, file: Path
) -> None:
    state, campaign = after(file, tmp_path / "r", most=4), load_campaign(file)
    trial_id = next(iter(state.results))
    assert has_result(campaign, state, "alpha", trial_id)
    state.results[trial_id] = state.results[trial_id] | {"status": "stopped"}
    assert not has_result(campaign, state, "alpha", trial_id)
    searching = replace(campaign.phases[0], stops_early=True)
    campaign = replace(campaign, phases=(searching, campaign.phases[1]), early_stop=EarlyStop(first=3))
    assert has_result(campaign, state, "alpha", trial_id) and not has_result(campaign, state, "projection", trial_id)


CHAIN = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
  - name: projection
    inherit: alpha
    grid: {project_every: [1, 3]}
  - name: long
    inherit: alpha
    set: {steps: 12}
    vary: {weight_decay: [0.1]}
  - name: confirm
    inherit: long
    seeds: fresh 3
    runs: [{arm: baseline}]
"""


def test_trials_that_cannot_be_planned_yet_are_expected_in_stages(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=CHAIN)
    (short, *_), _, (long, *_), _ = [phase.arms for phase in preview(load_campaign(file))]
    of_short, of_long = trial_flops(short.trials[0].config), trial_flops(long.trials[0].config)
    assert of_long > 1.5 * of_short
    # The baseline of `projection` is the guessed winner, trained again on other seeds than those of the first phase.
    stages = expected_stages(load_campaign(file), after(file, tmp_path / "one", most=1))
    assert [[(some["phase"], some["trials"], some["work"]["flops"]) for some in stage] for stage in stages] == [
        [("projection", 2, of_short), ("projection", 2, of_short), ("long", 4, of_long)],
        [("confirm", 3, of_short)],
    ]
    state = after(file, tmp_path / "four", most=4)  # alpha is over, and the two phases after it are planned
    assert list(state.phases) == ["alpha", "projection", "long"]
    assert state.expected_stages == expected_stages(load_campaign(file), state) == stages[1:]


def test_arms_that_optuna_has_not_proposed_yet_are_expected(tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("optuna")
    space = "space: {optim.lr: {log: [1e-3, 1e-1]}}"
    search = f"\n  - name: s\n    search: {{method: optuna, confirm: false, trials: 30, {space}}}\n"
    state = after(write_file(tmp_path, corpus, phases=search), tmp_path / "r", most=1)
    n = len(state.phases["s"].arms)
    assert 1 < n < 31
    assert [[some["trials"] for some in stage] for stage in state.expected_stages] == [[2 * (31 - n)]]
