"""The claims of several campaigns on one page: each claim once, by source, with what each campaign found.

Claims with the same source, id and sentence are the same claim. Campaigns are judged separately and never pooled,
since they differ in size, data or device. Their common verdict is that of the campaigns that could decide; if one
reproduced a claim and another refuted it, it is undecided, and the page shows both.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.claims.relations import RELATIONS
from tune.claims.selectors import describe, short
from tune.report.markdown import cell, glossary, markdown_table
from tune.report.wording import CLAIM_VERDICTS, CLAIMS_NOTE
from tune.results.summary import own_claims, summarize_claims
from tune.spec.schema import Claim
from tune.storage.state import CampaignState, read_state

SHORT_ID = 6  # digits of a trial's hash, for people


@dataclass(frozen=True)
class ClaimInCampaign:
    """What one campaign found about a claim."""

    campaign: str
    verdict: str
    observed: float | None
    ci_low: float | None
    ci_high: float | None
    n: int  # seeds
    trials: Sequence[str]
    why: str


@dataclass
class LedgerClaim:
    """A claim with the findings of all campaigns; `verdict` is their common one."""

    id: str
    source: str | None
    says: str | None
    tested: str
    found: list[ClaimInCampaign] = field(default_factory=list)
    verdict: str = "no data"


@dataclass(frozen=True)
class LedgerCampaign:
    """How a campaign was run: ranges over its trials, and the command that repeats it."""

    campaign: str
    results: str
    device: str | None
    corpus: str | None
    corpus_tokens: int | None
    n_params: Sequence[int] | None  # smallest and largest
    steps: Sequence[int] | None
    tokens: Sequence[int] | None
    seeds: Sequence[int]
    trials: int
    dates: Sequence[str] | None  # first and last
    confidence: float
    min_effect: float
    metric: str
    command: str


@dataclass(frozen=True)
class Ledger:
    """All claims by source, the number of each verdict, and the campaigns."""

    counts: Mapping[str, int]
    claims: Sequence[LedgerClaim]
    campaigns: Sequence[LedgerCampaign]


def collect(roots: Sequence[Path], claims: Sequence[Claim] | None = None) -> Ledger:
    """Collects the claims of several results directories, or judges `claims` by each of them.

    Raises:
        ConfigError: a directory has no campaign, or there are no claims at all.
    """
    entries: dict[tuple[Any, ...], LedgerClaim] = {}
    campaigns: dict[str, LedgerCampaign] = {}
    for root in dict.fromkeys(map(Path, map(os.path.normpath, roots))):  # `results/a/` is `results/a`
        state = read_state(root)
        name = state.campaign["campaign"]
        if name in campaigns:  # the same campaign on another device, for example
            name = f"{name} in {root}"
        campaigns[name] = _about(name, root, state)
        judged = own_claims(state) if claims is None else claims
        for claim, result in zip(judged, summarize_claims(state, judged), strict=True):
            entry = LedgerClaim(claim.id, claim.source, claim.says, question(claim))
            entry = entries.setdefault((claim.source, claim.id, claim.says), entry)
            kept = ("verdict", "observed", "ci_low", "ci_high", "n", "trials", "why")
            entry.found.append(ClaimInCampaign(name, **{field: getattr(result, field) for field in kept}))
    if not entries:
        raise ConfigError(f"no claims in {fmt.listing(map(str, roots))}; give a file that has some with --claims FILE")
    # By source, those without one last; within a source as they were written.
    ordered = sorted(entries.values(), key=lambda entry: (entry.source is None, entry.source or ""))
    for entry in ordered:
        entry.verdict = common_verdict([found.verdict for found in entry.found])
    verdicts = [entry.verdict for entry in ordered]
    counts = {verdict: verdicts.count(verdict) for verdict in CLAIM_VERDICTS}
    return Ledger(counts, ordered, list(campaigns.values()))


def common_verdict(verdicts: Collection[str]) -> str:
    """The verdict of those that could decide; undecided if they disagree."""
    decided = {verdict for verdict in verdicts if verdict in ("reproduced", "refuted")}
    if len(decided) == 1:
        return decided.pop()
    return "undecided" if decided or "undecided" in verdicts else "no data"


def question(claim: Claim) -> str:
    """What a claim asks of the records: `val_loss: alpha=0.28 below alpha=0.05`."""
    left, right, about = describe(claim.left), describe(claim.right), f"{claim.value or 0:g} ± {claim.tolerance or 0:g}"
    words = {
        "less": f"{left} below {right}",
        "greater": f"{left} above {right}",
        "equal": f"{left} within {claim.tolerance or 0:g} of {right}",
        "ratio": f"{left} over {right} is {about}",
        "best": f"{left} is the best of its phase",
        "monotone": f"{claim.direction} along {short(claim.setting or '')}",
        "arithmetic": f"{claim.expression} is {about}",
    }
    text = words[claim.relation]
    return f"{claim.metric}: {text}" if RELATIONS[claim.relation].trains else text


def _about(name: str, root: Path, state: CampaignState) -> LedgerCampaign:
    rules, data = state.campaign, state.campaign["data"]
    planned = {trial_id for phase in state.phases.values() for trial_id in phase.trial_ids}
    results = [result for trial_id, result in state.results.items() if trial_id in planned]

    def ends(values: Iterable[Any]) -> list[Any] | None:
        known = sorted(value for value in values if value)
        return [known[0], known[-1]] if known else None

    return LedgerCampaign(
        campaign=name,
        results=str(root),
        device=rules["environment"].get("device"),
        corpus=data.get("corpus"),
        corpus_tokens=data.get("train_tokens"),
        **{name: ends(result["metrics"].get(name) for result in results) for name in ("n_params", "steps", "tokens")},
        seeds=sorted({seed for phase in state.phases.values() for seed in phase.seeds}),
        trials=len(results),
        dates=ends((result["started_at"] or "")[:10] for result in results),
        metric=rules["metric"]["name"],
        **{name: rules[name] for name in ("confidence", "min_effect", "command")},
    )


# ---- the page ------------------------------------------------------------------------------------------------------


def total(ledger: Ledger) -> str:
    """`31 claims: 9 reproduced, 12 refuted, 6 undecided, 4 no data`."""
    listed = ", ".join(f"{count} {verdict}" for verdict, count in ledger.counts.items())
    return f"{fmt.counted(len(ledger.claims), 'claim')}: {listed}"


def ledger_markdown(ledger: Ledger, *, command: str = "") -> str:
    """Renders the ledger as a Markdown page; `command` is how it was made."""
    made = f" This page was written by `{fmt.plain(command)}`." if command else ""
    lines = "\n".join(f"{fmt.plain(about.command)}    # {about.results}" for about in ledger.campaigns)
    parts = ["# Claims", f"**{total(ledger)}.**"]
    parts += [f"Sentences of earlier reports, each tested by trials that were run for it.{made}"]
    parts += ["## The campaigns", _campaign_table(ledger.campaigns)]
    parts += [f"To run them again, and where their results are:\n\n```bash\n{lines}\n```"]
    for source in dict.fromkeys(entry.source for entry in ledger.claims):
        entries = [entry for entry in ledger.claims if entry.source == source]
        heading = f"Source {cell(source)}" if source else "Without a source"
        parts += [f"## {heading}", _claim_table(entries), "\n".join(map(_details, entries))]
    together = "Campaigns are judged separately. One that cannot decide does not outweigh one that can; if two "
    together += "decide differently, the claim is undecided."
    named = "A trial is named by its seed and by the first six digits of its id, as in its folder under `trials/`."
    parts += ["## How to read this", glossary(CLAIM_VERDICTS), f"{CLAIMS_NOTE} {together}", named]
    return "\n\n".join(parts) + "\n"


def _claim_table(entries: Iterable[LedgerClaim]) -> str:
    """A row for each claim and each campaign with data on it; the claim itself is in its first row only."""
    rows = []
    for entry in entries:
        claim = (entry.id, entry.says, entry.tested)
        for found in _shown(entry):
            where = found.campaign if found.trials else None
            rows.append((*claim, found.verdict, _observed(found), found.n or None, where))
            claim = ("″", "″", "″")
    header = ("claim", "what was said", "tested as", "verdict", "observed", "seeds", "campaign")
    return markdown_table(header, rows, right=("seeds",))


def _observed(found: ClaimInCampaign) -> str:
    """A value with its interval; a sum, which has none, with as many digits as it needs."""
    if found.observed is not None and found.ci_low is None:
        return f"{found.observed:.6g}"
    return fmt.claim_value(found.observed, found.ci_low, found.ci_high)


def _details(entry: LedgerClaim) -> str:
    shown = _shown(entry)
    parts = []
    for found in shown:
        where = f"in {cell(found.campaign)}, " if len(shown) > 1 else ""
        parts.append(f"{where}{cell(fmt.sentence(found.why))}")
        parts += [f"Trials: {_trials(found.trials)}."] if found.trials else []
    if {found.verdict for found in shown} >= {"reproduced", "refuted"}:
        parts.append("The campaigns disagree, so it is undecided.")
    return f"- **{cell(entry.id)}**: {' '.join(parts)}"


def _shown(entry: LedgerClaim) -> list[ClaimInCampaign]:
    """The campaigns that have data on a claim; if none has, the first one."""
    telling = [found for found in entry.found if found.verdict != "no data"] or entry.found[:1]
    return telling if any(found.trials for found in telling) else telling[:1]  # a sum is the same everywhere


def _trials(trial_ids: Iterable[str]) -> str:
    """`d70ab5 (seeds 1, 2, 3), f27752 (seeds 1, 2, 3)`: the seeds of an arm share the first part of their ids."""
    seeds: dict[str, list[str]] = {}
    for trial_id in trial_ids:
        arm, _, seed = trial_id.rpartition("-s")
        seeds.setdefault(arm[:SHORT_ID], []).append(seed)
    return ", ".join(f"{cell(arm)} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for arm, own in seeds.items())


def _campaign_table(campaigns: Iterable[LedgerCampaign]) -> str:
    header = ("campaign", "device", "data", "parameters", "steps", "tokens a trial", "seeds", "trials", "run on")
    rows = []
    for about in campaigns:
        corpus = Path(about.corpus or "").name or None  # of a path only the name says what it is
        data = f"{corpus}, {fmt.count(about.corpus_tokens)} tokens" if corpus else None
        sizes = [_range(ends, fmt.count) for ends in (about.n_params, about.steps, about.tokens)]
        seeds = fmt.listing(map(str, about.seeds), most=8)
        rows.append((about.campaign, about.device, data, *sizes, seeds, about.trials, _range(about.dates, str)))
    return markdown_table(header, rows, right=("trials",))


def _range(ends: Sequence[Any] | None, write: Callable[[Any], str]) -> str | None:
    """`0.8M`, or `13.7M to 52.8M`."""
    return " to ".join(dict.fromkeys(map(write, ends))) if ends else None
