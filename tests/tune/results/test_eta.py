"""What is left of a campaign is weighed by its work: phases of long trials, of other shapes, that stop early."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_campaign import begun, drive, next_trial, pretend, session_on, write_file
from tune.planning.plan import trial_flops
from tune.results.eta import seconds_left
from tune.results.snapshot import Running
from tune.storage.state import CampaignState, replay
from tune.trials.trial import TrialResult, TrialSpec

pytestmark = pytest.mark.usefixtures("no_report")

LONG_CONFIRM = """
  - name: alpha
    vary: {alpha: [0.05, 0.1, 0.2, 0.4]}
  - name: confirm
    set: {steps: 500}
    inherit: alpha
    vary: {project_every: [1, 3]}
"""
LARGE_CONFIRM = LONG_CONFIRM.replace("{steps: 500}", "{model.n_layer: 8}")


@dataclass
class Sample:
    """What was shown at a moment of a pretended campaign, and what was true."""

    phase: str | None
    ended: int  # trials
    shown: float | None
    left: float


def pretended(file: Path, root: Path, seconds_of: Callable[[TrialSpec], float], *, workers: int = 2) -> list[Sample]:
    """Lets pretended workers take trials as real ones do, by a clock that costs nothing; looks twice per trial."""
    looks: list[tuple[float, str | None, int, float | None]] = []
    under_way: list[tuple[float, float, TrialSpec]] = []
    now, ended = 0.0, 0
    with session_on(file, root) as session:
        begun(session, workers=workers)
        while True:
            while len(under_way) < workers and (spec := next_trial(session)):
                spec.folder.mkdir(parents=True, exist_ok=True)
                under_way.append((now + seconds_of(spec), now, spec))
            if not under_way:
                break
            last = min(under_way, key=lambda found: found[0])
            for moment in (now, (now + last[0]) / 2):
                for end, start, spec in under_way:
                    step = int(spec.config.steps * (moment - start) / (end - start))
                    (spec.folder / "metrics.jsonl").write_text(json.dumps({"step": step}) + "\n")
                snapshot = session.snapshot()
                looks.append((moment, snapshot.phase, ended, snapshot.eta))
            under_way.remove(last)
            now, ended = last[0], ended + 1
            session.tell(last[2].trial_id, replace(pretend(last[2]), seconds=last[0] - last[1]))
    return [Sample(phase, n, shown, now - moment) for moment, phase, n, shown in looks]


def assert_close(samples: list[Sample], *, share: float) -> None:
    assert samples
    longest = max(sample.left for sample in samples)
    for sample in samples:
        assert sample.shown == pytest.approx(sample.left, rel=share, abs=share * longest / 4), sample


def test_a_last_phase_of_long_trials_is_known_from_the_first_result_on(tmp_path: Path, corpus: Path) -> None:
    file = write_file(tmp_path, corpus, phases=LONG_CONFIRM, steps=100, every=20)
    samples = pretended(file, tmp_path / "r", lambda spec: trial_flops(spec.config) * 1e-9)
    assert [sample.shown for sample in samples if not sample.ended] == [None, None]
    assert {sample.phase for sample in samples} == {"alpha", "confirm"}
    assert_close([sample for sample in samples if sample.ended], share=0.03)


def test_trials_that_are_not_equally_fast_change_it_little(tmp_path: Path, corpus: Path) -> None:
    def seconds(spec: TrialSpec) -> float:
        return trial_flops(spec.config) * 1e-9 * (0.9 + 0.2 * zlib.crc32(spec.trial_id.encode()) / 2**32)

    file = write_file(tmp_path, corpus, phases=LONG_CONFIRM, steps=100, every=20, seeds="[1, 2, 3, 4]")
    samples = pretended(file, tmp_path / "r", seconds, workers=3)
    assert_close([sample for sample in samples if sample.ended >= 3], share=0.15)


def test_a_shape_that_is_slower_than_its_arithmetic_is_known_once_one_of_it_has_ended(
    tmp_path: Path, corpus: Path
) -> None:
    def seconds(spec: TrialSpec) -> float:
        return trial_flops(spec.config) * 1e-9 * (2.0 if spec.config.model.n_layer == 8 else 1.0)

    file = write_file(tmp_path, corpus, phases=LARGE_CONFIRM, steps=100, every=20)
    samples = pretended(file, tmp_path / "r", seconds)
    n = next(sample.ended for sample in samples if sample.phase == "confirm")
    assert_close([sample for sample in samples if sample.ended > n], share=0.03)


# ---- from events of a journal, without a campaign ------------------------------------------------------------------

Arms = Mapping[str, tuple[str, float]]  # shape and FLOPs of a trial, by name; a token is two


def started(workers: int = 1) -> dict[str, Any]:
    return {"event": "campaign_started", "workers": workers}


def planned(name: str, arms: Arms, n_seeds: int = 1) -> dict[str, Any]:
    return {
        "event": "phase_planned",
        "phase": name,
        "inherit": None,
        "base": {},
        "baseline": next(iter(arms)),
        "seeds": list(range(n_seeds)),
        "swept": {},
        "arms": [
            {
                "arm": arm,
                "overrides": {},
                "trials": [[seed, f"{arm}-s{seed}"] for seed in range(n_seeds)],
                "work": {"shape": shape, "tokens": flops / 2, "flops": flops},
            }
            for arm, (shape, flops) in arms.items()
        ],
    }


def expected(*stages: list[tuple[str, int, str, float]]) -> dict[str, Any]:
    """Phase, number of trials, and the shape and FLOPs of each, in stages."""
    return {
        "event": "trials_expected",
        "stages": [
            [
                {"phase": phase, "trials": n, "work": {"shape": shape, "tokens": flops / 2, "flops": flops}}
                for phase, n, shape, flops in stage
            ]
            for stage in stages
        ],
    }


def ended(trial_id: str, seconds: float, *, status: str = "finished", steps: int = 100, **more: Any) -> dict[str, Any]:
    event = {"event": "trial_finished", "trial_id": trial_id, "status": status, "seconds": seconds, "attempt": 1}
    return event | {"metrics": {"steps": steps}, "config": {"steps": 100}, "provenance": {}} | more


def journal(*events: dict[str, Any]) -> CampaignState:
    def numbered() -> Iterator[dict[str, Any]]:
        for seq, event in enumerate(events, 1):
            yield {"seq": seq, "time": "2026-11-21T10:00:00.000+00:00", "elapsed": float(seq)} | event

    return replay(numbered())


def under_way(trial_id: str, step: int = 0, *, speed: float | None = None) -> Running:
    return Running(trial_id, "p", trial_id, 0, step, 100, None, None, speed)


TWO = {"a": ("x", 100.0), "b": ("x", 100.0)}


def test_nothing_is_said_before_anything_is_known_of_the_speed() -> None:
    state = journal(started(), planned("p", TWO))
    assert seconds_left(state, ()) is None
    assert seconds_left(state, (under_way("a-s0"),)) is None
    assert seconds_left(state, (under_way("a-s0", 25, speed=6.25),)) == pytest.approx(0.75 * 8 + 8)


def test_a_shape_without_a_result_goes_by_the_speed_of_its_running_trials() -> None:
    arms = TWO | {"c": ("y", 300.0), "d": ("y", 300.0)}
    state = journal(started(), planned("p", arms), ended("a-s0", 10.0), ended("b-s0", 10.0))
    assert seconds_left(state, (under_way("c-s0"),)) == pytest.approx(60.0)  # by its arithmetic
    assert seconds_left(state, (under_way("c-s0", 50, speed=3.0),)) == pytest.approx(25.0 + 50.0)


def test_the_first_trials_in_which_workers_start_are_soon_forgotten() -> None:
    arms = {name: ("x", 100.0) for name in "abcdefgh"}
    results = [ended(f"{name}-s0", 60.0 if name in "ab" else 10.0) for name in "abcdef"]
    assert seconds_left(journal(started(), planned("p", arms), *results), ()) == pytest.approx(20.0)


def test_a_running_trial_that_is_slower_than_those_before_it_counts_for_what_it_has_done() -> None:
    arms = TWO | {"c": ("x", 500.0), "d": ("x", 500.0)}
    state = journal(started(), planned("p", arms), ended("a-s0", 10.0), ended("b-s0", 10.0))
    slower = under_way("c-s0", 40, speed=1.25)  # 80 s for the 200 that it has done, after 20 s for as many
    assert seconds_left(state, (slower,)) == pytest.approx(300 * 0.4 + 500 * (10 + 80) / (100 + 200))


def test_a_trial_that_was_stopped_or_diverged_counts_for_the_steps_that_it_made() -> None:
    arms = TWO | {"c": ("x", 100.0)}
    for status in ("stopped", "diverged"):
        state = journal(started(), planned("p", arms), ended("a-s0", 10.0), ended("b-s0", 2.0, status=status, steps=20))
        assert seconds_left(state, (under_way("c-s0"),)) == pytest.approx(10.0)
    never = ended("b-s0", 0.0, status="stopped", steps=0)
    assert seconds_left(journal(started(), planned("p", TWO), never), ()) is None


def test_what_waits_in_a_phase_that_stops_trials_early_counts_for_less() -> None:
    arms = {name: ("x", 100.0) for name in "abcdefghij"}
    stops = [ended(f"{name}-s0", 2.0, status="stopped", steps=20) for name in "abc"]
    state = journal(started(), planned("p", arms), *stops, ended("d-s0", 10.0))
    # Three did a fifth, one ended and one trains as a whole: 0.52 each on average for the five that wait.
    assert seconds_left(state, (under_way("e-s0", 50),)) == pytest.approx(5.0 + 5 * 0.52 * 10.0)


def test_one_that_went_on_from_a_checkpoint_or_failed_says_nothing_of_the_speed() -> None:
    events = [started(), planned("p", TWO | {"c": ("x", 100.0), "d": ("x", 100.0)}), ended("a-s0", 10.0)]
    failed = ended("c-s0", 0.1, status="failed", steps=1)
    assert seconds_left(journal(*events, ended("b-s0", 1.0, attempt=2), failed), ()) == pytest.approx(10.0)


def test_an_earlier_session_counts_as_long_as_this_one_knows_nothing() -> None:
    plan = planned("p", TWO | {"c": ("x", 100.0), "d": ("y", 100.0)})
    events = [started(), plan, ended("a-s0", 30.0), started(), plan]
    assert seconds_left(journal(*events), ()) == pytest.approx(90.0)
    assert seconds_left(journal(*events, ended("b-s0", 10.0)), ()) == pytest.approx(20.0)


def test_of_trials_that_are_trained_together_each_takes_its_share() -> None:
    arms = {name: ("x", 100.0) for name in "abcdefgh"}
    together = [ended(f"{name}-s0", 20.0, provenance={"vectorised": 4}) for name in "abcd"]
    assert seconds_left(journal(started(), planned("p", arms), *together), ()) == pytest.approx(20.0)
    first = [under_way(f"{name}-s0", 50, speed=2.5) for name in "abcd"]
    assert seconds_left(journal(started(), planned("p", arms)), first) == pytest.approx(10.0 + 20.0)


def test_idle_workers_share_nothing_with_those_that_train() -> None:
    state = journal(started(workers=4), planned("p", TWO, n_seeds=3), ended("a-s0", 10.0))
    assert seconds_left(state, ()) == pytest.approx(20.0)  # four, and then the fifth
    assert seconds_left(state, (under_way("b-s0", 90),)) == pytest.approx(11.0)


def test_phases_that_are_not_planned_yet_come_in_stages() -> None:
    events = [started(workers=4), planned("p", TWO), ended("a-s0", 10.0)]
    stages = expected([("q", 2, "x", 500.0), ("r", 1, "x", 200.0)], [("s", 5, "x", 100.0)])
    assert seconds_left(journal(*events, stages), ()) == pytest.approx(10.0 + 50.0 + 20.0)
    # The plan of q takes the place of what was expected of it.
    now = [*events, stages, planned("q", {"e": ("x", 700.0)}), ended("b-s0", 10.0)]
    assert seconds_left(journal(*now), ()) == pytest.approx(70.0 + 20.0 + 20.0)


def test_it_is_never_negative_and_ends_at_zero() -> None:
    state = journal(started(), planned("p", TWO), ended("a-s0", 10.0))
    assert seconds_left(state, (under_way("b-s0", 130),)) == 0.0
    assert seconds_left(journal(started(), planned("p", TWO), ended("a-s0", 1.0), ended("b-s0", 1.0)), ()) == 0.0


def test_a_journal_without_work_shows_nothing() -> None:
    plan = planned("p", TWO)
    for arm in plan["arms"]:
        del arm["work"]
    assert seconds_left(journal(started(), plan, ended("a-s0", 10.0)), ()) is None


def result(spec: TrialSpec) -> TrialResult:
    return replace(pretend(spec), seconds=trial_flops(spec.config) * 1e-9)


def test_a_resumed_campaign_expects_what_is_left(tmp_path: Path, corpus: Path) -> None:
    file, root = write_file(tmp_path, corpus, phases=LONG_CONFIRM, steps=100, every=20), tmp_path / "r"
    with session_on(file, root) as session:
        drive(begun(session), result, most=7)
        session.stop_requested = True
        session.end()
    with session_on(file, root) as session:
        spec = next_trial(begun(session))
        assert spec
        shown = session.snapshot().eta
        session.tell(spec.trial_id, result(spec))
        seconds = [result(done).seconds for done in (spec, *drive(session, result))]
    assert shown == pytest.approx(sum(seconds))
