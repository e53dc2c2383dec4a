"""What the index of `serve` says about a campaign: a row with its state, its best arm and what it cost."""

from tune import format as fmt
from tune.report.overview import CampaignRow
from tune.results.answer import Lead, find_lead
from tune.results.phase_summary import count_trials, summarize_phase
from tune.results.snapshot import Snapshot
from tune.storage.state import CampaignState
from tune.storage.summaries import TrialCounts
from tune.terminal.live import activity_text


def campaign_row(name: str, now: Snapshot, state: CampaignState) -> CampaignRow:
    """What the index says about a campaign."""
    if not state.campaign:
        written = now.run.written if now.run else ""
        word = now.status if now.alive else "stopped"
        return CampaignRow(name, f"/{name}/", word, detail=detail(state, now), seconds=now.elapsed, newest=written)
    lead = find_lead(state, [summarize_phase(state, phase) for phase in state.phases.values()])
    planned = sorted({trial_id for phase in state.phases.values() for trial_id in phase.trial_ids})
    results = [state.results[trial_id] for trial_id in planned if trial_id in state.results]
    statuses = [state.outcome(trial_id).status for trial_id in planned]
    ended = "finished" if state.status == "finished" else "stopped"
    arm, note = lead_words(state, now, lead)
    return CampaignRow(
        name=name,
        href=f"/{name}/",
        state=now.status if now.alive else ended,
        detail=detail(state, now),
        progress=fmt.counted(now.total, "trial") if now.done == now.total else f"{now.done} of {now.total} trials",
        remaining=f"about {fmt.duration(now.eta, tenths=False)} left" if now.eta is not None else "",
        arm=arm,
        note=note,
        metric=state.campaign["metric"]["name"],
        delta=lead.arm.delta if lead else None,
        done=now.done,
        total=now.total,
        problems=problems(count_trials(statuses, reused=0)),
        tokens=sum(result["metrics"].get("tokens") or 0 for result in results),
        seconds=now.elapsed,
        newest=state.newest,
    )


def lead_words(state: CampaignState, now: Snapshot, lead: Lead | None) -> tuple[str | None, str]:
    """The best arm, and how sure that is."""
    if state.is_smoke:
        return None, "a smoke run answers nothing"
    if lead is not None:
        if lead.refuted_by:
            return lead.arm.arm, f"not confirmed by phase {fmt.listing(lead.refuted_by)}"
        return lead.arm.arm, "confirmed on fresh seeds" if lead.confirmed else "better; not confirmed yet"
    if now.best is not None:
        arm, score, n = now.best
        return arm, f"so far: {now.metric} {fmt.number(score)}, {fmt.counted(n, 'seed')}"
    return (None, "") if not now.phases else ("baseline", "no arm is better")


def detail(state: CampaignState, now: Snapshot) -> str:
    """Where a campaign stands within its phases, or why it does not go on."""
    if now.alive and now.run and now.run.activities:
        return activity_text(now.run.activities[0])
    if now.alive:
        return f"phase {now.phase}, {now.phase_number} of {now.n_phases}" if now.phase else ""
    if state.status == "finished":
        return ""
    return state.status if state.campaign and state.ended else "killed"


def problems(counts: TrialCounts) -> str:
    """How many trials failed or diverged: `1 failed, 2 diverged`."""
    parts = {"failed": counts.failed, "diverged": counts.diverged}
    return ", ".join(f"{count} {name}" for name, count in parts.items() if count)
