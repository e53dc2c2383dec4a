"""Says what the seeds of a phase mean for its verdicts: repeated confirmations, seeds seen before, a lucky baseline."""

from collections.abc import Iterator

from tune import format as fmt
from tune.storage.seed_ledger import LEDGER_FILE
from tune.storage.state import CampaignState, PhaseState

ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def seed_warnings(state: CampaignState, phase: PhaseState) -> list[str]:
    """The warnings about the seeds of a phase."""
    return [*_confirmation_warnings(phase), *_luck_warnings(state, phase)]


def is_confirmation(phase: PhaseState) -> bool:
    """Whether a phase compares an earlier winner with a baseline on seeds that nobody has looked at."""
    return phase.fresh is not None and phase.fresh.question is not None


def _confirmation_warnings(phase: PhaseState) -> Iterator[str]:
    draw = phase.fresh
    if draw and draw.look > 1 and draw.confidence is not None:
        ordinal = ORDINALS[draw.look] if draw.look < len(ORDINALS) else f"{draw.look}th"
        text = f"{ordinal} confirmation of the same question in this results folder: tested at"
        yield f"{text} {100 * (1 - draw.confidence):.2g} %, so that all of them together keep the level"
    if draw and draw.question and not draw.recorded:
        yield f"its seeds could not be entered in {LEDGER_FILE}: another campaign may have looked at them"
    if phase.seen:
        listed = fmt.listing(map(str, phase.seen), most=6)
        text = "it compares a winner on seeds that were looked at before"
        yield f"{text} ({listed}), so it confirms nothing: use `seeds: fresh`"


def _luck_warnings(state: CampaignState, phase: PhaseState) -> Iterator[str]:
    """Warns if the trials of the baseline are those with which it won an earlier phase."""
    name = phase.inherit
    while name in state.phases:
        earlier = state.phases[name]
        if earlier.winner not in (None, earlier.baseline):
            if set(earlier.seeds) & set(phase.seeds):
                text = f"its baseline won phase {earlier.name} with the same trials, so its luck is in every difference"
                yield f"{text}: leave out `seeds:` to train it on other seeds"
            return
        name = earlier.inherit
