"""Machine time that a campaign used, and the trials that were started more than once."""

from tune.storage.state import CampaignState
from tune.storage.summaries import Cost, RetriedTrial


def campaign_cost(state: CampaignState) -> Cost:
    """Computes slots, device hours, efficiency and retried trials.

    Device hours are the wall time of all sessions times the number of GPUs (one on a CPU machine). Efficiency is the
    time inside training steps (tokens divided by steady-state tokens per second) divided by wall time times slots,
    summed over the sessions; None if no trial has measured its speed.
    """
    environment = state.campaign["environment"]
    on_cpu = str(environment.get("device") or "").startswith("cpu")
    devices = 1 if on_cpu else max(1, environment.get("gpus") or 1)
    planned = sorted({trial_id for phase in state.phases.values() for trial_id in phase.trial_ids})
    results = [state.results[trial_id] for trial_id in planned if trial_id in state.results]
    seconds = state.seconds + state.session_seconds()
    slot_seconds = state.slot_seconds + state.session_slot_seconds(state.session_seconds())
    timed = [result for result in results if result["metrics"].get("tokens_per_second")]
    step_seconds = 0.0
    for result in timed:  # the time of a vectorised group is divided among its trials
        metrics, group_size = result["metrics"], result["provenance"].get("vectorised", 1)
        step_seconds += (metrics.get("tokens") or 0) / metrics["tokens_per_second"] / group_size
    return Cost(
        slots=state.max_slots,
        device_hours=seconds * devices / 3600,
        step_seconds=step_seconds if timed else None,
        efficiency=step_seconds / slot_seconds if timed and slot_seconds else None,
        retried=tuple(_retried(state, trial_id) for trial_id in planned if state.attempts.get(trial_id, 0) > 1),
    )


def _retried(state: CampaignState, trial_id: str) -> RetriedTrial:
    """Describes a trial that was started again because it failed, lost its worker, or was interrupted."""
    phase, arm, seed = next(
        (phase.name, arm.name, seed)
        for phase in state.phases.values()
        for arm in phase.arms
        for seed, candidate in arm.trial_ids.items()
        if candidate == trial_id
    )
    status = state.results[trial_id]["status"] if trial_id in state.results else "not finished yet"
    return RetriedTrial(phase, arm, seed, trial_id, state.attempts[trial_id], status)
