"""Enters the seeds of each phase in the ledger before its first trial, and draws those of `seeds: fresh`."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tune import format as fmt
from tune.analysis.power import POWER, Design, power
from tune.planning.plan import PlannedPhase, inherited_overrides, trial_work
from tune.planning.seeds import (
    content_of,
    draw_seeds,
    level_of_look,
    number_of_fresh,
    seed_family,
    seed_question,
)
from tune.spec.schema import FEWEST_FRESH, MOST_FRESH, Campaign, Phase
from tune.storage.records import FreshDraw
from tune.storage.seed_ledger import SeedEntry, SeedLedger
from tune.storage.state import CampaignState, Overrides
from tune.storage.summaries import PhaseSummary

BORROWED_WEIGHT = 1 / 3  # of the degrees of freedom; `python -m tune.bench confirmations` shows what it costs


class SeedAllocator:
    """Allocates the seeds of phases, and enters them in the ledger beside the results directory `root`.

    A ledger that cannot be read or written does not stop the campaign: `message` says so in one line, and fresh seeds
    then differ from all that this campaign has used.
    """

    def __init__(self, root: Path, state: CampaignState, *, message: Callable[[str], None]) -> None:
        self._name, self._state, self._message = root.name, state, message
        self._ledger = SeedLedger(root.parent)
        self._has_neighbours = any(path.parent != root for path in root.parent.glob("*/journal.jsonl"))
        self._said: set[str] = set()

    def record_listed(self, campaign: Campaign, phase: Phase, planned: PlannedPhase) -> tuple[int, ...]:
        """Enters the listed seeds of a phase. If it confirms a winner, returns those that were looked at before."""
        entry = self._entry(campaign, phase, seeds=planned.seeds)
        try:
            self._say_if_missing()
            seen = self._ledger.add_listed(entry)
            self._say_damage()
        except OSError as error:
            self._say_failure(error)
            seen = set[int]()
        if not winners_to_confirm(campaign, phase, planned, self._state):
            return ()
        others = (seeds for name, seeds in self._state.last_seeds.items() if name != phase.name)
        return tuple(sorted((seen | set[int]().union(*others)) & set(planned.seeds)))

    def draw(
        self, campaign: Campaign, phase: Phase, planned: PlannedPhase, summaries: Mapping[str, PhaseSummary]
    ) -> FreshDraw:
        """Draws the seeds of a phase with `seeds: fresh`, or enters those again that it has been planned with before.

        `summaries` of the finished phases say how many seeds find the effect of the winner again.
        """
        old, n_fresh, alpha = planned.fresh, number_of_fresh(phase), 1 - campaign.confidence
        content = old.content if old else content_of(phase, planned.identities)
        confirms = winners_to_confirm(campaign, phase, planned, self._state)
        question = seed_question(campaign, planned.identities[0]) if confirms else None
        if old:
            question, confirms = old.question, old.confirms
        found = phases_of_winners(campaign, phase, summaries)
        same_work = [one for chain in found.values() for one in chain if self._is_as_long(one, planned)]
        prior = borrowed_noise(same_work) if question else None
        own = {seed for listed in self._state.last_seeds.values() for seed in listed}
        own |= {seed for draw in self._state.draws.values() for seed in draw.seeds}
        own |= {seed for other in campaign.phases for seed in other.known_seeds or ()}

        def effects_at(look: int) -> list[tuple[float, Design]]:
            level, prior_df = level_of_look(alpha, look), prior[0] if prior else None
            return effects_to_find_again(campaign, phase, found, level=level, prior_df=prior_df)

        def choose(seen: Collection[int], look: int) -> tuple[int, ...]:
            if old:
                return old.seeds
            n = n_fresh or seeds_to_find_again(effects_at(look))
            return draw_seeds(content, n, own | set(seen))

        entry = self._entry(
            campaign,
            phase,
            seeds=old.seeds if old else (),
            content=content,
            question=question,
            look=old.look if old else 0,
        )
        try:
            self._say_if_missing()
            entry, is_new = self._ledger.enter(entry, choose)
            self._say_damage()
            if old and is_new and old.recorded:
                self._message(f"{self._ledger.path}: it lacks the seeds of phase {phase.name}; entered again")
            is_recorded = True
        except OSError as error:
            self._say_failure(error)
            look = old.look if old else int(question is not None)
            entry, is_recorded = self._entry(campaign, phase, seeds=choose((), look), look=look), False
        if old:
            return old
        for effect, design in effects_at(entry.look) if n_fresh is None else ():
            chance = f"{100 * power(effect, len(entry.seeds), design):.0f} % power"
            self._message(f"phase {phase.name}: {len(entry.seeds)} seeds find {effect:.2g} again with {chance}")
        confidence = round(1 - level_of_look(alpha, entry.look), 12) if entry.look > 1 else None
        return FreshDraw(content, entry.seeds, question, entry.look, confidence, confirms, is_recorded, prior)

    def _is_as_long(self, summary: PhaseSummary, planned: PlannedPhase) -> bool:
        """Whether a phase trained as many tokens per trial, so that its noise says something about `planned`."""
        work = self._state.phases[summary.phase].arms[0].work
        return work is not None and work.tokens == trial_work(planned.arms[0].trials[0].config)

    def _entry(self, campaign: Campaign, phase: Phase, *, seeds: tuple[int, ...] = (), **fields: Any) -> SeedEntry:
        digest = hashlib.sha256(campaign.text.encode()).hexdigest()
        family = seed_family(campaign, phase)
        return SeedEntry(self._name, phase.name, family, seeds, file_sha256=digest, **fields)

    def _say_if_missing(self) -> None:
        if self._has_neighbours and not self._ledger.path.exists():
            text = "it is missing, so the seeds of earlier campaigns in this folder are not known; a new one is begun"
            self._say("missing", f"{self._ledger.path}: {text}")

    def _say_damage(self) -> None:
        if self._ledger.damaged:
            lines = fmt.listing(map(str, self._ledger.damaged), most=5)
            self._say("damage", f"{self._ledger.path}: line {lines} does not match its CRC and is ignored")

    def _say_failure(self, error: OSError) -> None:
        text = f"{error.strerror or error}; fresh seeds differ only from those that this campaign has used"
        self._say("failure", f"{self._ledger.path}: {text}")

    def _say(self, what: str, text: str) -> None:
        if what not in self._said:
            self._said.add(what)
            self._message(text)


def winners_to_confirm(
    campaign: Campaign, phase: Phase, planned: PlannedPhase, state: CampaignState
) -> tuple[Overrides, ...]:
    """The overrides of the winners that a phase compares with a baseline without them; empty if it confirms none."""
    if len(planned.arms) < 2:
        return ()
    winners = {name: done.winner_overrides for name, done in state.phases.items() if done.winner}
    winners |= {path: winner.overrides for path, winner in campaign.inherited.items()}
    found = [dict(winners[arm.inherit]) for arm in phase.arms if arm.inherit in winners]
    if phase.confirms and (best := state.phases[phase.confirms].best):
        found.append(dict(inherited_overrides(planned, planned.baseline)) | dict(best.overrides))
    return tuple(one for one in found if one and not one.items() <= dict(planned.base).items())


def effects_to_find_again(
    campaign: Campaign,
    phase: Phase,
    found: Mapping[str, Sequence[PhaseSummary]],
    *,
    level: float,
    prior_df: float | None,
) -> list[tuple[float, Design]]:
    """The effects of the winners that `phase` confirms at `level`, each with the design of the confirmation.

    Effects are those after allowing for selection; a winner that has inherited another has both. A winner without a
    measured effect is left out.
    """
    effects = []
    n_arms = 1 + bool(phase.confirms) + sum(bool(arm.inherit or arm.overrides) for arm in phase.arms)
    for summaries in found.values():
        winners = [summary.winning_arm for summary in summaries]
        effect = abs(sum(winner.shrunken or 0.0 for winner in winners if winner))
        sds = [summary.noise.sd for summary in summaries if summary.noise.sd]
        if effect and sds:
            effects.append((effect, Design(n_arms, max(sds), "paired", 1 - level, campaign.min_effect, prior_df)))
    return effects


def seeds_to_find_again(effects: Sequence[tuple[float, Design]]) -> int:
    """The seeds that find each effect with 80 % power, from FEWEST_FRESH (also without effects) to MOST_FRESH."""
    sizes = range(FEWEST_FRESH, MOST_FRESH)
    needed = [next((n for n in sizes if power(effect, n, design) >= POWER), MOST_FRESH) for effect, design in effects]
    return max(needed, default=FEWEST_FRESH)


def phases_of_winners(
    campaign: Campaign, phase: Phase, summaries: Mapping[str, PhaseSummary]
) -> dict[str, list[PhaseSummary]]:
    """For each arm of `phase` with a winner of its own: the finished phases that led to this winner, newest first."""
    inherit = {other.name: other.inherit or "" for other in campaign.phases}
    searches = {other.name: other.confirms for other in campaign.phases if other.confirms}
    found: dict[str, list[PhaseSummary]] = {}
    if phase.confirms and phase.confirms in summaries:
        found[phase.confirms] = [summaries[phase.confirms]]
    for arm in phase.arms:
        name = searches.get(arm.inherit or "", arm.inherit or "")
        while name in summaries and name != phase.inherit:
            found.setdefault(arm.name, []).append(summaries[name])
            name = inherit[name]
    return found


def borrowed_noise(summaries: Iterable[PhaseSummary]) -> tuple[float, float] | None:
    """Degrees of freedom and variance of a difference on one seed, from the phases that led to a winner.

    The interval of the winner in its phase says how noisy its difference is, by the most cautious reading. Of several
    such phases the noisiest and the smallest counts, at a third of its weight, since baseline and seeds differ (the
    discount of a power prior, Ibrahim and Chen 2000). None if no phase has a winner with an interval.
    """
    from scipy.special import stdtrit

    dfs, variances = list[float](), list[float]()
    for summary in summaries:
        winner = summary.winning_arm
        delta = winner.delta if winner else None
        if winner and delta and delta.df and delta.ci_low is not None and delta.ci_high is not None:
            # With `until: decided` the interval is that of the last look at the arm, at the level of this look.
            levels = [look.level for look in summary.looks if winner.arm in {row.arm for row in look.arms}]
            level = levels[-1] if levels else 1 - summary.confidence
            error = (delta.ci_high - delta.ci_low) / 2 / float(stdtrit(delta.df, 1 - level / 2))
            dfs.append(delta.df)
            variances.append(error**2 * winner.n)
    return (BORROWED_WEIGHT * min(dfs), max(variances)) if dfs and max(variances) > 0 else None
