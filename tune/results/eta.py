"""How long a running campaign still takes: what its trials have taken per unit of their work, times the work left.

Work is what `--plan` counts: the arithmetic of a trial, evaluations included, and its shape of model and batch, since
the same arithmetic takes longer in some shapes than in others. The journal has both for each arm of the plan, so that
nothing of a plan is computed again when the view is drawn, and who only looks needs no torch.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        """Counts a trial that has done this share of its work in so many seconds of its worker."""
        if seconds > 0 and share > 0:
            self.seconds[work.shape] += seconds
            self.flops[work.shape] += work.flops * share

    def rates(self) -> dict[str, float]:
        """Seconds per FLOP."""
        return {shape: seconds / self.flops[shape] for shape, seconds in self.seconds.items()}

    def overall(self) -> float:
        """Seconds per FLOP of all shapes together."""
        return sum(self.seconds.values()) / sum(self.flops.values())


def seconds_left(state: CampaignState, running: Sequence[Running]) -> float | None:
    """Seconds until the last trial ends, or None as long as nothing says how fast they are.

    Workers take the running trials' rests, each at its own speed, then what is planned, in its order; then come the
    phases that nobody can plan yet, in stages, since each waits for winners of the one before it. So a worker that
    finds nothing to do waits.

    A phase that stops trials early is expected to go on doing so: what waits in it counts for the share of their work
    that its trials have done on average, the running ones taken as whole. Before it has stopped one, and in phases that
    are not planned yet, all count as whole, so that this is then the longest that it can take.
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
    waiting = [seconds(works[i]) * shares[phase] for phase, i in _waiting(state, works) if i not in under_way]
    left = _makespan([*rests, *waiting], workers)
    for stage in state.expected_stages:
        trials = ((TrialWork(**some["work"]), shares.get(some["phase"], 1.0), some["trials"]) for some in stage)
        left += _makespan((seconds(work) * share for work, share, n in trials for _ in range(n)), workers)
    return left


def _paces(
    state: CampaignState, under_way: Mapping[str, Running], works: Mapping[str, TrialWork], own: Mapping[str, float]
) -> tuple[Pace, Pace]:
    """How fast trials were in this session, the running ones included, and in those before it.

    Of the trials of a shape that ended in this session the later half counts: workers start and compile in the first
    ones, and who else uses the machine changes. A trial that went on from a checkpoint does not say what a whole one
    takes. One that ended early took its time for the steps that it made. Of trials that are trained together each takes
    its share.
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
    """How much of its work a trial has done that has a result."""
    if result["status"] == "finished":
        return 1.0
    return (result["metrics"].get("steps") or 0) / result["config"]["steps"]


def _share_of_phase(phase: PhaseState, state: CampaignState, under_way: Mapping[str, Running]) -> float:
    """What a trial of a phase does of its work before early stopping ends it, on average."""
    ended = [state.results[trial_id] for trial_id in phase.trial_ids if trial_id in state.results]
    stopped = [share for result in ended if result["status"] == "stopped" and (share := _share_done(result))]
    whole = sum(result["status"] != "stopped" for result in ended)
    whole += sum(trial.phase == phase.name for trial in under_way.values())
    return (sum(stopped) + whole) / (len(stopped) + whole) if stopped else 1.0


def _waiting(state: CampaignState, works: Mapping[str, TrialWork]) -> Iterator[tuple[str, str]]:
    """Phase and id of the planned trials that have no result yet, once each, in the order in which they are trained."""
    seen = set[str]()
    for phase in state.phases.values():
        for seed in phase.seeds:
            for arm in phase.arms:
                trial_id = arm.trial_ids[seed]
                if trial_id in works and trial_id not in state.results and trial_id not in seen:
                    seen.add(trial_id)
                    yield phase.name, trial_id


def _makespan(trials: Iterable[float], workers: int) -> float:
    """When the last of trials of these seconds ends, where each worker takes the next one as soon as it is free."""
    free_at = [0.0] * workers
    for seconds in trials:
        heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
