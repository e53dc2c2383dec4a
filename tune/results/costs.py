"""What a campaign cost, and what it had to do twice: read from its state, shown in the report."""

from collections.abc import Mapping
from typing import Any

from tune.storage.state import CampaignState


def account(state: CampaignState) -> dict[str, Any]:
    """Slots, device hours, efficiency and repeated trials of a campaign, for its summary.

    `device_hours`: wall time of all sessions times the devices that were held (GPUs, or the machine as one).
    `efficiency`: time inside training steps (tokens over steady-state tokens per second) over wall time times slots,
    session by session. None where no trial has measured its speed.
    """
    planned = sorted({trial_id for phase in state.phases.values() for trial_id in phase.trial_ids})
    results = {trial_id: state.results[trial_id] for trial_id in planned if trial_id in state.results}
    seconds = state.seconds + state.session_seconds()
    slot_seconds = state.slot_seconds + state.session_seconds() * max(1, state.campaign["workers"])
    timed = [result for result in results.values() if result["metrics"].get("tokens_per_second")]
    inside = sum(map(_inside, timed))
    return {
        "slots": state.most_slots,
        "device_hours": seconds * _devices(state.campaign["environment"]) / 3600,
        "step_seconds": inside if timed else None,
        "efficiency": inside / slot_seconds if timed and slot_seconds else None,
        "retried": [_retried(state, results, trial_id) for trial_id in planned if state.attempts.get(trial_id, 0) > 1],
    }


def _inside(result: Mapping[str, Any]) -> float:
    """Seconds of a trial inside steps; of one that was trained together with others, its share."""
    metrics, company = result["metrics"], result["provenance"].get("vectorised", 1)
    return metrics["tokens"] / metrics["tokens_per_second"] / company


def _devices(environment: Mapping[str, Any]) -> int:
    on_cpu = str(environment.get("device") or "").startswith("cpu")
    return 1 if on_cpu else max(1, environment.get("gpus") or 1)


def _retried(state: CampaignState, results: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
    """A trial that was started more than once: its worker died, it had failed, or the campaign was stopped in it."""
    phase, arm, seed = next(
        (phase.name, arm.name, seed)
        for phase in state.phases.values()
        for arm in phase.arms
        for seed, own in arm.trial_ids.items()
        if own == trial_id
    )
    status = results[trial_id]["status"] if trial_id in results else "not finished yet"
    place = {"phase": phase, "arm": arm, "seed": seed, "trial_id": trial_id}
    return place | {"attempts": state.attempts[trial_id], "status": status}
