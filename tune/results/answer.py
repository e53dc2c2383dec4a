"""The answer of a campaign in one sentence: what to use, how much better it is, and whether fresh seeds confirm it."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any, NamedTuple

from tune import format as fmt
from tune.storage.state import CampaignState, PhaseState
from tune.storage.summaries import Answer, ArmSummary, Delta, PhaseSummary

SMOKE = "SMOKE: a tiny model and a few steps show whether the campaign runs, and nothing else."


def settings_text(overrides: Mapping[str, Any]) -> str:
    """Formats settings for a sentence: `alpha=0.2, project_every=10`, or `the base as it is`."""
    from tune.spec.reading import short  # imports torch, which a look at many campaigns does not need

    return fmt.settings({short(name): value for name, value in overrides.items()}, "the base as it is")


class Lead(NamedTuple):
    """The best arm of the last phase in which one beat the baseline."""

    phase: PhaseSummary
    arm: ArmSummary
    overrides: Mapping[str, Any]  # what a later phase inherits from it, relative to the campaign's base
    confirmed: bool  # the phase used fresh seeds for a winner of an earlier phase, or for the best arm of a search
    refuted_by: Sequence[str]  # later phases that tested the same settings again and found no gain


def find_lead(state: CampaignState, phases: Sequence[PhaseSummary]) -> Lead | None:
    """Returns the arm that leads so far, or None if no phase has one; `phases` are in order."""
    improved = [phase for phase in _judged(state, phases) if phase.winner not in (None, phase.baseline)]
    if not improved:
        return None
    last = improved[-1]
    arm = last.winning_arm
    assert arm is not None and arm.delta is not None, "a better arm has a difference from its baseline"
    overrides, place = _inherited_overrides(state.phases[last.phase], arm), phases.index(last)
    confirmed = any(_inherits(overrides, winner) for winner in _confirmed_winners(state, last, phases[:place]))
    later = _judged(state, phases[place + 1 :])
    return Lead(last, arm, overrides, confirmed, [each.phase for each in later if _tests_again(each, overrides)])


def find_answer(state: CampaignState, phases: Sequence[PhaseSummary]) -> Answer:
    """Returns the answer that the leading arm gives; `phases` are in order.

    If a later phase tested its settings again and found no gain, the answer is undecided. A smoke run has no answer.
    """
    if state.is_smoke:
        return Answer(SMOKE)
    judged, is_over = _judged(state, phases), state.status == "finished"
    lead = find_lead(state, phases)
    if lead is None:
        return Answer(_prefix_so_far(is_over or not judged, _no_answer(state, judged, is_over)))
    last, arm, overrides, confirmed, refuted_by = lead
    assert arm.delta is not None
    how = "unseen " if confirmed else "paired " if last.noise.method == "paired" else ""
    on_top = (
        f", on top of {last.inherit}" if last.inherit and last.base else ""
    )  # the effect excludes that of the inherited settings
    effect = f"{_effect(last, arm.delta)}, on {arm.n} {how}seeds{on_top}"
    shrunken = None if confirmed else arm.shrunken
    if shrunken is not None:
        effect += f" (about {abs(shrunken):.2g} after allowing for selection; confirm it)"
    if refuted_by:
        sentence = f"Undecided: {settings_text(overrides)} {effect}, "
        sentence += f"but phase {', '.join(refuted_by)} does not confirm it."
    else:
        sentence = f"Use {settings_text(overrides)}: it {effect}."
        if later := judged[judged.index(last) + 1 :]:
            sentence += f" Phase {', '.join(phase.phase for phase in later)} found nothing better."
    return Answer(_prefix_so_far(is_over, sentence), last.phase, last.winner, overrides, arm.delta, confirmed, shrunken)


def _judged(state: CampaignState, phases: Sequence[PhaseSummary]) -> list[PhaseSummary]:
    """Returns the phases that have compared arms and are over."""
    return [phase for phase in phases if len(phase.arms) > 1 and state.phases[phase.phase].winner]


def _confirmed_winners(
    state: CampaignState, last: PhaseSummary, before: Sequence[PhaseSummary]
) -> Sequence[Mapping[str, Any]]:
    """Returns the overrides of the winners that the phase `last` tests on seeds that nobody has looked at."""
    phase = state.phases[last.phase]
    if phase.tells_fresh:
        return phase.fresh.confirms if phase.fresh and phase.fresh.question else ()
    # Older journals: seeds that no earlier phase of the campaign has used.
    is_fresh = not {seed for earlier in before for seed in earlier.seeds} & set(last.seeds)
    return [state.phases[earlier.phase].winner_overrides for earlier in before] if is_fresh else []


def _inherited_overrides(phase: PhaseState, arm: ArmSummary) -> dict[str, Any]:
    """Returns what a later phase inherits from `arm`, relative to the campaign's base.

    The journal says it for the winner at that time. If the rules of this version make another arm the winner, the
    settings of its base that are handed on stay, and those of the arm are exchanged.
    """
    if phase.winner == arm.arm:
        return dict(phase.winner_overrides)
    handed_on = {name: value for name, value in phase.base.items() if name in phase.winner_overrides}
    return handed_on | dict(arm.overrides)


def _no_answer(state: CampaignState, judged: Sequence[PhaseSummary], is_over: bool) -> str:
    arms = [arm for phase in judged for arm in phase.arms]
    if not judged:
        return "No phase has been completed yet, so there is no answer."
    if not any(arm.n for arm in arms):
        if any(phase.trials.finished for phase in judged):
            return f"No finished trial has a usable value of {judged[-1].metric.name}, so there is no answer."
        return "No trial has finished successfully, so there is no answer."
    if without := [
        phase.phase for phase in judged if not any(arm.n for arm in phase.arms if arm.arm == phase.baseline)
    ]:
        return f"The baseline of phase {', '.join(without)} has no result, so no arm can be compared with it."
    if all(any(arm.verdict == "no claim" for arm in phase.arms) for phase in judged):
        return "One seed carries no claim: no arm can be called better than its baseline."
    phases = "any phase" if is_over else "any completed phase"
    sentence = f"No arm of {phases} is better than its baseline beyond the noise"
    if unstable := [phase.phase for phase in judged if _baseline_diverged(state, phase)]:
        return f"{sentence}, but the baseline of phase {', '.join(unstable)} diverged with some seeds."
    return f"{sentence}: keep the base."


def _baseline_diverged(state: CampaignState, phase: PhaseSummary) -> bool:
    """Whether the baseline of a phase diverged with a seed."""
    baseline = next(arm for arm in state.phases[phase.phase].arms if arm.name == phase.baseline)
    return any(state.outcome(i, phase.metric.name).status == "diverged" for i in baseline.trial_ids.values())


def _effect(phase: PhaseSummary, delta: Delta) -> str:
    """Formats an effect: `lowers val_loss by 0.102, 95% interval 0.078 to 0.125`; two digits if it is small."""
    digits = max(3, 1 - floor(log10(abs(delta.mean))))
    ends = sorted((abs(delta.ci_low or 0.0), abs(delta.ci_high or 0.0)))
    low, high = (f"{end:.{digits}f}" for end in ends)
    direction = "lowers" if delta.mean < 0 else "raises"
    interval = f"{100 * phase.confidence:g}% interval {low} to {high}"
    return f"{direction} {phase.metric.name} by {abs(delta.mean):.{digits}f}, {interval}"


def _inherits(overrides: Mapping[str, Any], winner: Mapping[str, Any]) -> bool:
    """Whether the overrides include all settings of a winner; false for a winner without settings, the base itself."""
    return bool(winner) and {**overrides, **winner} == overrides


def _tests_again(phase: PhaseSummary, overrides: Mapping[str, Any]) -> bool:
    """Whether a phase compares an arm that has all of `overrides` with a baseline that lacks them."""
    tested = {arm.arm for arm in phase.arms if _inherits({**phase.base, **arm.overrides}, overrides)}
    return bool(tested) and phase.baseline not in tested


def _prefix_so_far(is_over: bool, sentence: str) -> str:
    return sentence if is_over else f"So far, {sentence[0].lower()}{sentence[1:]}"
