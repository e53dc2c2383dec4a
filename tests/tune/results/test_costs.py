"""The cost of a campaign, computed from events by hand, and what had to be done twice."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_campaign import begun, drive, pretend, session_on, write_file
from tune.report.wording import cost_facts, troubles
from tune.results.costs import campaign_cost
from tune.storage.state import CampaignState, replay
from tune.storage.summaries import CampaignSummary, PhaseSummary, RetriedTrial
from tune.trials.trial import TrialResult, TrialSpec

ONE = """
  - name: alpha
    vary: {alpha: [0.05, 0.4]}
"""


def state(
    device: str = "cpu (x)",
    gpus: int = 0,
    speed: float | None = 100.0,
    provenance: dict[str, Any] | None = None,
) -> CampaignState:
    """Two trials of 1,000 tokens on 2 slots in a session of 20 s; the second was started twice."""
    common = {"time": "2026-11-21T10:00:00+00:00"}
    environment = {"device": device, "gpus": gpus}
    arms = [{"arm": "a", "overrides": {}, "trials": [[1, "x-s1"], [2, "x-s2"]]}]
    planned = {"inherit": None, "base": {}, "baseline": "a", "seeds": [1, 2], "swept": {}, "arms": arms}
    events = [
        {"event": "campaign_started", "workers": 2, "environment": environment},
        {"event": "phase_planned", "phase": "p"} | planned,
        {"event": "trial_started", "trial_id": "x-s1", "attempt": 1},
        {"event": "trial_started", "trial_id": "x-s2", "attempt": 2},
    ]
    ended = {"event": "trial_finished", "status": "finished", "provenance": provenance or {}}
    ended["metrics"] = {"tokens": 1000, "tokens_per_second": speed}
    events += [ended | {"trial_id": f"x-s{n}"} for n in (1, 2)]
    events += [{"event": "campaign_ended", "status": "finished", "seconds": 20.0}]
    return replay(event | common for event in events)


def test_efficiency_is_time_inside_steps_over_wall_time_times_slots() -> None:
    found = campaign_cost(state())
    assert found.step_seconds == pytest.approx(20.0)  # 2 x 1000 / 100
    assert found.efficiency == pytest.approx(20 / (20 * 2))
    assert found.slots == 2


def test_each_session_counts_with_the_slots_that_it_had() -> None:
    later = {"event": "campaign_started", "workers": 1, "environment": {"device": "cpu (x)", "gpus": 0}}
    again = state()
    for event in (later, {"event": "campaign_ended", "status": "finished", "seconds": 4.0}):
        again.apply(event | {"time": "2026-11-22T10:00:00+00:00"})
    assert (again.seconds, again.slot_seconds, again.max_slots) == (24.0, 20 * 2 + 4 * 1, 2)
    # The phases of a campaign are planned again in each session; what was trained before is known.
    again.phases = state().phases
    found = campaign_cost(again)
    assert found.efficiency == pytest.approx(20 / 44) and found.slots == 2


def test_a_session_whose_cluster_changes_counts_with_the_slots_of_each_time() -> None:
    """Two slots for 5 s, six for 10 s, none for 5 s: 70 slot seconds."""
    events = [
        {"event": "campaign_started", "workers": 2, "environment": {"device": "cpu (x)", "gpus": 0}},
        {"event": "workers_changed", "workers": 6, "elapsed": 5.0},
        {"event": "workers_changed", "workers": 0, "elapsed": 15.0},
    ]
    again = replay(event | {"time": "2026-11-21T10:00:00+00:00"} for event in events)
    assert (again.session_slot_seconds(20.0), again.max_slots) == (70.0, 6)
    again.apply({"event": "campaign_ended", "status": "stopped", "seconds": 20.0, "time": "2026-11-21T10:00:20+00:00"})
    assert again.slot_seconds + again.session_slot_seconds(again.session_seconds()) == 70.0


@pytest.mark.parametrize(("device", "gpus", "hours"), [("cpu (x)", 4, 20 / 3600), ("NVIDIA GH200", 2, 40 / 3600)])
def test_device_hours_count_the_gpus_that_were_held(device: str, gpus: int, hours: float) -> None:
    assert campaign_cost(state(device, gpus)).device_hours == pytest.approx(hours)


def test_trials_that_were_trained_together_share_the_time_inside_steps() -> None:
    assert campaign_cost(state(provenance={"vectorised": 2})).step_seconds == pytest.approx(10.0)


def test_without_a_measured_speed_there_is_no_efficiency() -> None:
    found = campaign_cost(state(speed=None))
    assert found.efficiency is None and found.step_seconds is None
    assert "efficiency" not in cost_facts(CampaignSummary(cost=found))


def test_a_trial_that_was_started_twice_is_named() -> None:
    cost = campaign_cost(state())
    assert cost.retried == (RetriedTrial("p", "a", 2, "x-s2", attempts=2, status="finished"),)
    shown = troubles(CampaignSummary(cost=cost))
    assert shown == ["p/a seed 2 was started 2 times; final status: finished."]


def test_a_failed_trial_that_is_run_again_is_a_trouble_of_the_summary(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tune.report.html.write_report", lambda *_: None)
    file = write_file(tmp_path, corpus, phases=ONE)

    def fails_once(spec: TrialSpec) -> TrialResult:
        return pretend(spec, status="failed" if spec.seed == 2 and spec.config.model.alpha == 0.4 else "finished")

    for result_of in (fails_once, pretend):
        with session_on(file, tmp_path / "tiny") as session:
            drive(begun(session), result_of)
            summary = session.end()
    assert [(trial.arm, trial.attempts) for trial in summary.cost.retried] == [("alpha=0.4", 2)]
    assert summary.problems == ()


def test_skipped_shards_are_reported_if_there_were_any() -> None:
    assert troubles(CampaignSummary(phases=(PhaseSummary(phase="a"),), data={"skipped_shards": 0})) == []
    shown = troubles(CampaignSummary(data={"skipped_shards": 1}))
    assert shown == ["1 corrupt shard was skipped when the data were read."]
