"""Remaining time of a running campaign: measured seconds per FLOP for each model shape, times the FLOPs left.

The journal records the shape and the FLOPs of each planned arm (`TrialWork`), so `status` does not need torch.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapreplace
from typing import Any

from tune.results.snapshot import Running
from tune.storage.records import TrialWork
from tune.storage.state import DONE, CampaignState, PhaseState

Sample = tuple[TrialWork, float, float]  # a trial, its training seconds so far, and the fraction of its work done


def seconds_left(state: CampaignState, running: Sequence[Running]) -> float | None:
    """Estimates the seconds until the last trial ends; None until a speed is known.

    Workers finish the running trials at their own speeds, then take the planned trials in order. Phases that cannot be
    planned yet follow in stages, since each stage waits for the winners of the previous one.

    If a phase stops trials early, each of its waiting trials is expected to complete the average fraction of its work
    that the phase's ended and running trials complete, where running trials count as complete. Until the first trial
    is stopped, waiting trials are expected to run to the end.
    """
    phases = state.phases.values()
    works = {i: arm.work for phase in phases for arm in phase.arms if arm.work for i in arm.trial_ids.values()}
    under_way = {trial.trial_id: trial for trial in running if trial.trial_id in works}
    workers = max(1, state.workers)
    per_worker = max(1.0, len(under_way) / workers)  # trials that share one worker
    full_seconds = {  # of each running trial from first to last step, at its own speed
        trial_id: works[trial_id].tokens / trial.tokens_per_second / per_worker
        for trial_id, trial in under_way.items()
        if trial.tokens_per_second
    }
    now, earlier = _samples(state, under_way, works, full_seconds)
    rates = _rates(earlier) | _rates(now)
    if not rates:
        return None

    def seconds(work: TrialWork) -> float:
        return work.flops * rates.get(work.shape, rates[None])

    shares = {phase.name: _share_of_phase(phase, state, under_way) for phase in phases}
    running_left = [
        (full_seconds.get(i) or seconds(works[i])) * max(0.0, 1 - trial.step / trial.steps)
        for i, trial in under_way.items()
    ]
    waiting = [seconds(works[i]) * shares[phase] for i, phase in _waiting(state, works).items() if i not in under_way]
    left = _makespan([*running_left, *waiting], workers)
    for stage in state.expected_stages:
        trials = ((TrialWork(**row["work"]), shares.get(row["phase"], 1.0), row["trials"]) for row in stage)
        left += _makespan((seconds(work) * share for work, share, n in trials for _ in range(n)), workers)
    return left


def _rates(samples: Iterable[Sample]) -> dict[str | None, float]:
    """Returns the seconds per FLOP of each shape, and under None those of all shapes together."""
    totals: defaultdict[str | None, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for work, seconds, share in samples:
        for shape in (work.shape, None) if seconds > 0 and share > 0 else ():
            totals[shape][0] += seconds
            totals[shape][1] += work.flops * share
    return {shape: seconds / flops for shape, (seconds, flops) in totals.items()}


def _samples(
    state: CampaignState,
    under_way: Mapping[str, Running],
    works: Mapping[str, TrialWork],
    full_seconds: Mapping[str, float],
) -> tuple[list[Sample], list[Sample]]:
    """Returns the trials that show the speed of this session, running ones included, and that of earlier sessions.

    Of the trials that ended in this session, only the later half for each shape is used, since the first ones include
    worker startup and compilation. Trials that needed a second attempt are ignored. The time of a vectorised group is
    divided among its trials.
    """
    earlier: list[Sample] = []
    ended: defaultdict[str, list[Sample]] = defaultdict(list)
    for trial_id, result in state.results.items():
        if trial_id in works and result["status"] in DONE and result["attempt"] == 1:
            seconds = result["seconds"] / result["provenance"].get("vectorised", 1)
            sample = works[trial_id], seconds, _share_done(result)
            if result["seq"] < state.campaign["seq"]:
                earlier.append(sample)
            else:
                ended[works[trial_id].shape].append(sample)
    now = [sample for samples in ended.values() for sample in samples[len(samples) // 2 :]]
    for trial_id, seconds in full_seconds.items():
        share = min(1.0, under_way[trial_id].step / under_way[trial_id].steps)
        now.append((works[trial_id], share * seconds, share))
    return now, earlier


def _share_done(result: Mapping[str, Any]) -> float:
    if result["status"] == "finished":
        return 1.0
    return (result["metrics"].get("steps") or 0) / result["config"]["steps"]


def _share_of_phase(phase: PhaseState, state: CampaignState, under_way: Mapping[str, Running]) -> float:
    """Returns the average fraction of its work that a trial of `phase` completes; 1 until a trial is stopped early."""
    ended = [state.results[trial_id] for trial_id in phase.trial_ids if trial_id in state.results]
    stopped = [share for result in ended if result["status"] == "stopped" and (share := _share_done(result))]
    complete = sum(result["status"] != "stopped" for result in ended)
    complete += sum(trial.phase == phase.name for trial in under_way.values())
    return (sum(stopped) + complete) / (len(stopped) + complete) if stopped else 1.0


def _waiting(state: CampaignState, works: Mapping[str, TrialWork]) -> dict[str, str]:
    """Maps each planned trial without a result to the first phase that needs it, in training order."""
    phases: dict[str, str] = {}
    for phase in state.phases.values():
        for seed in phase.seeds:
            for arm in phase.arms:
                if seed in arm.trial_ids:
                    phases.setdefault(arm.trial_ids[seed], phase.name)
    return {i: phase for i, phase in phases.items() if i in works and i not in state.results}


def _makespan(durations: Iterable[float], workers: int) -> float:
    """Returns when the last trial ends if each worker takes the next trial as soon as it is free."""
    free_at = [0.0] * workers
    for seconds in durations:
        heapreplace(free_at, free_at[0] + seconds)
    return max(free_at)
