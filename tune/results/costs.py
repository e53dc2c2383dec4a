"""What a campaign cost, and what it had to do twice: read from its state, shown in the report."""

from collections.abc import Mapping
from typing import Any

from tune import format as fmt
from tune.storage.state import State


def account(state: State) -> dict[str, Any]:
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


def _retried(state: State, results: Mapping[str, Any], trial_id: str) -> dict[str, Any]:
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


def cost_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """The cost of a campaign in words, by name; what is not known is left out."""
    spent = summary.get("cost") or {}
    facts = {
        "trials": fmt.campaign_counts(summary.get("trials")),
        "training tokens": fmt.count(summary.get("tokens")),
        "wall time": fmt.duration(summary.get("seconds")),
        "time inside trials": fmt.duration(summary.get("trial_seconds")),
    }
    if spent.get("device_hours") is not None:
        facts["device hours"] = f"{spent['device_hours']:.3g}"
    if spent.get("slots"):
        facts["trials at a time"] = f"at most {spent['slots']}"
    if packing := summary.get("packing"):
        facts["packing"] = packing_fact(packing)
    if spent.get("efficiency") is not None:
        inside = fmt.duration(spent.get("step_seconds"))
        facts["efficiency"] = f"{spent['efficiency']:.0%} ({inside} inside training steps over wall time times slots)"
    return facts


def packing_fact(packing: Mapping[str, Any]) -> str:
    """How many trials shared a device, for people: the choice, why, and the curve it was chosen from."""
    n = packing["trials_per_device"]
    text = f"{n} trial{'' if n == 1 else 's'} at once on each device ({fmt.plain(packing['why'])})"
    curve = [f"{point['trials']}: {fmt.count(point['tokens_per_second'])}" for point in packing["curve"]]
    return f"{text}; tokens/s in all by trials at once: {', '.join(curve)}" if curve else text


def troubles(summary: Mapping[str, Any]) -> list[str]:
    """What went wrong besides trials that ended badly, one sentence each."""
    found = []
    for trial in (summary.get("cost") or {}).get("retried") or []:
        place = f"{fmt.plain(trial['phase'])}/{fmt.plain(trial['arm'])} seed {trial['seed']}"
        found.append(f"{place} was started {trial['attempts']} times; in the end: {fmt.plain(trial['status'])}.")
    skipped = (summary.get("data") or {}).get("skipped_shards")
    if skipped:
        found.append(f"{skipped} corrupt shard{'s were' if skipped > 1 else ' was'} skipped when the data were read.")
    phases = [phase for phase in summary.get("phases") or [] if phase.get("warnings")]
    if phases:
        counts = (f"{len(phase['warnings'])} in {fmt.plain(phase.get('phase'))}" for phase in phases)
        found.append(f"Warnings stand with their phases: {fmt.listing(counts)}.")
    return found
