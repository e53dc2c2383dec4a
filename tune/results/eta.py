"""Time left of a running campaign: the seconds per FLOP of its trials so far, by shape, times the FLOPs left.

The journal has the shape and the FLOPs of each planned arm (`TrialWork`), so `status` does not need torch.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapreplace
from typing import Any

from tune.results.snapshot import Running
from tune.storage.records import TrialWork
from tune.storage.state import DONE, CampaignState, PhaseState


@dataclass
class Pace:
    """Seconds and FLOPs of what was trained, by shape."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, work: TrialWork, seconds: float, share: float) -> None:
        """Counts a trial that has done `share` of its work in `seconds`."""
        if seconds > 0 and share > 0:
            self.seconds[work.shape] += seconds
            self.flops[work.shape] += work.flops * share

    def rates(self) -> dict[str, float]:
        """Seconds per FLOP."""
        return {shape: seconds / self.flops[shape] for shape, seconds in self.seconds.items()}

    def overall(self) -> float:
        """Seconds per FLOP over all shapes."""
        return sum(self.seconds.values()) / sum(self.flops.values())


def seconds_left(state: CampaignState, running: Sequence[Running]) -> float | None:
    """Seconds until the last trial ends; None before any speed is known.

    Workers finish the running trials, each at its own speed, then take the planned ones in order. Phases that cannot be
    planned yet follow in stages, since each waits for the winners of an earlier one.

    Where a phase stops trials early, a waiting trial counts for the average share of its work that the trials of the
    phase have done, running ones as whole. Before the first stop, and in phases that are not planned yet, all count as
    whole.
    """
    works = {
        trial_id: arm.work
        for phase in state.phases.values()
        for arm in phase.arms
        if arm.work
        for trial_id in arm.trial_ids.values()
    }
    under_way = {trial.trial_id: trial for trial in running if trial.trial_id in works}
    workers = max(1, state.campaign["workers"])
    at_once = max(1.0, len(under_way) / workers)  # in one worker
    own = {  # what the running trials take as a whole, by their own speed
        trial_id: works[trial_id].tokens / trial.tokens_per_second / at_once
        for trial_id, trial in under_way.items()
        if trial.tokens_per_second
    }
    now, earlier = _paces(state, under_way, works, own)
    if not (now.seconds or earlier.seconds):
        return None
    rates = earlier.rates() | now.rates()
    overall = (now if now.seconds else earlier).overall()

    def seconds(work: TrialWork) -> float:
        return work.flops * rates.get(work.shape, overall)

    shares = {name: _share_of_phase(phase, state, under_way) for name, phase in state.phases.items()}
    rests = [(own.get(i) or seconds(works[i])) * max(0.0, 1 - t.step / t.steps) for i, t in under_way.items()]
    waiting = [seconds(works[i]) * shares[phase] for i, phase in _waiting(state, works).items() if i not in under_way]
    left = _makespan([*rests, *waiting], workers)
    for stage in state.expected_stages:
        trials = ((TrialWork(**some["work"]), shares.get(some["phase"], 1.0), some["trials"]) for some in stage)
        left += _makespan((seconds(work) * share for work, share, n in trials for _ in range(n)), workers)
    return left


def _paces(
    state: CampaignState, under_way: Mapping[str, Running], works: Mapping[str, TrialWork], own: Mapping[str, float]
) -> tuple[Pace, Pace]:
    """The speed of the trials of this session, running ones included, and of earlier sessions.

    Only the later half of a shape's trials counts, since workers start and compile in the first ones. Trials that
    resumed from a checkpoint do not count. Trials that are trained together share their time.
    """
    now, earlier = Pace(), Pace()
    ended: defaultdict[str, list[tuple[TrialWork, float, float]]] = defaultdict(list)
    for trial_id, result in state.results.items():
        if trial_id in works and result["status"] in DONE and result["attempt"] == 1:
            seconds = result["seconds"] / result["provenance"].get("vectorised", 1)
            done = works[trial_id], seconds, _share_done(result)
            if result["seq"] < state.campaign["seq"]:
                earlier.add(*done)
            else:
                ended[works[trial_id].shape].append(done)
    for trials in ended.values():
        for done in trials[len(trials) // 2 :]:
            now.add(*done)
    for trial_id, seconds in own.items():
        share = min(1.0, under_way[trial_id].step / under_way[trial_id].steps)
        now.add(works[trial_id], share * seconds, share)
    return now, earlier


def _share_done(result: Mapping[str, Any]) -> float:
    is_whole = result["status"] == "finished"
    return 1.0 if is_whole else (result["metrics"].get("steps") or 0) / result["config"]["steps"]


def _share_of_phase(phase: PhaseState, state: CampaignState, under_way: Mapping[str, Running]) -> float:
    """The average share of its work that a trial of a phase does before early stopping ends it."""
    ended = [state.results[trial_id] for trial_id in phase.trial_ids if trial_id in state.results]
    stopped = [share for result in ended if result["status"] == "stopped" and (share := _share_done(result))]
    whole = sum(result["status"] != "stopped" for result in ended)
    whole += sum(trial.phase == phase.name for trial in under_way.values())
    return (sum(stopped) + whole) / (len(stopped) + whole) if stopped else 1.0


def _waiting(state: CampaignState, works: Mapping[str, TrialWork]) -> dict[str, str]:
    """The first phase of each planned trial without a result, in the order in which they are trained."""
    phases: dict[str, str] = {}
    for phase in state.phases.values():
        for seed in phase.seeds:
            for arm in phase.arms:
                phases.setdefault(arm.trial_ids[seed], phase.name)
    return {name: phase for name, phase in phases.items() if name in works and name not in state.results}


def _makespan(trials: Iterable[float], workers: int) -> float:
    """Seconds until the last trial ends, if each worker takes the next one as soon as it is free."""
    free_at = [0.0] * workers
    for seconds in trials:
        heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
