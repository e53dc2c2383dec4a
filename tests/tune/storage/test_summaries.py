"""Summaries as types: what is written reads back equal, and what an older version wrote still opens."""

import json
from dataclasses import replace

import pytest

from tests.helpers.summaries import from_json
from tune.storage.summaries import (
    Answer,
    ArmSummary,
    CampaignSummary,
    ClaimResult,
    Cost,
    Delta,
    Objective,
    PhaseNoise,
    PhaseSummary,
    RetriedTrial,
    Spread,
    TrialCounts,
    TrialProblem,
    TrialRecord,
    to_json,
)

BETTER = ArmSummary(
    "alpha=0.4",
    rank=1,
    overrides={"model.alpha": 0.4, "optim.betas": [0.9, 0.95]},
    n=2,
    score=Spread(4.0, 0.1, 3.9, 4.1),
    delta=Delta(-0.1, -0.2, -0.05, 0.01, 0.02),
    verdict="better",
    trial_ids=("a-s1", "a-s2"),
)
PHASE = PhaseSummary(
    phase="alpha",
    metric=Objective("val_bpb"),
    seeds=(1, 2),
    swept={"model.alpha": [0.05, 0.4]},
    arms=(BETTER, ArmSummary("tied", tied_with_winner=True), ArmSummary("alpha=0.05", verdict="baseline")),
    baseline="alpha=0.05",
    winner="alpha=0.4",
    noise=PhaseNoise(0.1, "paired", 0.8, 6, 0.2),
    warnings=("edge",),
    trials=TrialCounts(total=6, finished=6),
)
CAMPAIGN = CampaignSummary(
    campaign="tiny",
    status="finished",
    answer=Answer("Use alpha=0.4.", "alpha", "alpha=0.4", {"model.alpha": 0.4}, BETTER.delta, True),
    cost=Cost(2, 0.1, 3.0, 0.5, (RetriedTrial("alpha", "tied", 1, "b-s1", 2, "finished"),)),
    environment={"device": "cpu"},
    phases=(PHASE,),
    claims=(ClaimResult("c", verdict="reproduced", observed=-0.1, trials=("a-s1",)),),
    problems=(TrialProblem("alpha", "tied", 2, "b-s2", "diverged"),),
    left_out={"alpha": 1},
    warnings=("alpha: edge", "the budget was reached"),
)


def test_a_campaign_reads_back_equal_from_strict_json() -> None:
    text = json.dumps(to_json(CAMPAIGN), allow_nan=False)
    assert from_json(CampaignSummary, json.loads(text)) == CAMPAIGN


def test_a_record_reads_back_equal_with_its_fields_in_order() -> None:
    record = TrialRecord("c", "p", "a", "t-s1", 1, {"model.alpha": 0.4}, {"steps": 6}, "finished", {"val_loss": 4.0})
    assert from_json(TrialRecord, json.loads(json.dumps(to_json(record)))) == record
    assert list(to_json(record))[:5] == ["campaign", "phase", "arm", "trial_id", "seed"]


@pytest.mark.parametrize("data", [{}, {"phases": None, "answer": None, "trials": None, "of_a_later_version": 1}])
def test_missing_and_null_fields_take_their_defaults(data: dict[str, object]) -> None:
    assert from_json(CampaignSummary, data) == CampaignSummary()


def test_a_phase_knows_its_winning_arm_and_the_arms_that_tie_with_it() -> None:
    assert PHASE.winning_arm is BETTER and PHASE.ties == ["tied"]
    assert replace(PHASE, winner=None).winning_arm is None


def test_a_campaign_knows_the_phase_of_its_answer_and_the_warnings_that_no_phase_shows() -> None:
    assert CAMPAIGN.answer_phase is CAMPAIGN.phases[0] and CampaignSummary().answer_phase is None
    assert CAMPAIGN.own_warnings == ["the budget was reached"]
