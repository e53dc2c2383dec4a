"""Lists the claims of several campaigns on one page, each claim once, with the result of each campaign.

Claims with the same source, id and sentence are the same claim. Campaigns are judged separately and never pooled,
since they differ in size, data or device. The common verdict ignores campaigns that could not decide. If one campaign
reproduced a claim and another refuted it, the claim is undecided and the page shows both.
"""

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.claims.evidence import ClaimVerdict
from tune.claims.relations import RELATIONS
from tune.claims.selectors import describe
from tune.report.markdown import cell, glossary, markdown_table
from tune.report.wording import CLAIM_VERDICTS, CLAIMS_NOTE
from tune.results.summary import own_claims, summarize_claims
from tune.spec.reading import short
from tune.spec.schema import Claim
from tune.storage.state import CampaignState, read_state

SHORT_ID = 6  # hex digits of a trial id that the page shows


@dataclass(frozen=True, kw_only=True)
class ClaimInCampaign(ClaimVerdict):
    """The verdict of one campaign on a claim."""

    campaign: str
    verdict_at_scale: str


@dataclass
class LedgerClaim:
    """A claim with the results of all campaigns and their common verdict."""

    id: str
    source: str | None
    says: str | None
    tested: str
    found: list[ClaimInCampaign] = field(default_factory=list)
    verdict: str = "no data"


@dataclass(frozen=True)
class Ledger:
    """All claims sorted by source, the number of claims per verdict, and the campaigns."""

    counts: Mapping[str, int]
    claims: Sequence[LedgerClaim]
    campaigns: Sequence[Mapping[str, Any]]  # see `_describe_campaign`


def collect(roots: Sequence[Path], claims: Sequence[Claim] | None = None) -> Ledger:
    """Judges the claims of several results directories, or `claims` with the trials of each directory.

    Raises:
        ConfigError: a directory has no campaign, or no directory has claims.
    """
    entries: dict[tuple[Any, ...], LedgerClaim] = {}
    campaigns: dict[str, dict[str, Any]] = {}
    for root in dict.fromkeys(map(Path, map(os.path.normpath, roots))):  # `results/a/` is `results/a`
        state = read_state(root)
        name = f"SMOKE {state.campaign['campaign']}" if state.is_smoke else state.campaign["campaign"]
        if name in campaigns:  # the same campaign on another device, for example
            name = f"{name} in {root}"
        campaigns[name] = _describe_campaign(name, root, state)
        judged = own_claims(state) if claims is None else claims
        for claim, result in zip(judged, summarize_claims(state, judged), strict=True):
            entry = LedgerClaim(claim.id, claim.source, claim.says, question(claim))
            entry = entries.setdefault((claim.source, claim.id, claim.says), entry)
            verdict = {field.name: getattr(result, field.name) for field in fields(ClaimVerdict)}
            entry.found.append(ClaimInCampaign(campaign=name, verdict_at_scale=result.verdict_at_scale, **verdict))
    if not entries:
        raise ConfigError(f"no claims in {fmt.listing(map(str, roots))}; give a file that has some with --claims FILE")
    # By source, claims without a source last; within a source in file order.
    ordered = sorted(entries.values(), key=lambda entry: (entry.source is None, entry.source or ""))
    for entry in ordered:
        entry.verdict = common_verdict([result.verdict for result in entry.found])
    verdicts = [entry.verdict for entry in ordered]
    counts = {verdict: verdicts.count(verdict) for verdict in CLAIM_VERDICTS}
    return Ledger(counts, ordered, list(campaigns.values()))


def common_verdict(verdicts: Collection[str]) -> str:
    """Returns the verdict of the campaigns that could decide; `undecided` if they disagree."""
    decided = {verdict for verdict in verdicts if verdict in ("reproduced", "refuted")}
    if len(decided) == 1:
        return decided.pop()
    return "undecided" if decided or "undecided" in verdicts else "no data"


def question(claim: Claim) -> str:
    """Describes how a claim is tested: `val_loss: alpha=0.28 below alpha=0.05`."""
    left, right = describe(claim.left), describe(claim.right)
    value = fmt.digits(claim.value or 0, 6)
    expected = f"{value} ± {claim.tolerance or 0:g}"
    words = {
        "less": f"{left} below {right}",
        "greater": f"{left} above {right}",
        "equal": f"{left} within {claim.tolerance or 0:g} of {right}",
        "ratio": f"{left} over {right} is {expected}",
        "below": f"{left} below {value}",
        "above": f"{left} above {value}",
        "synergy": f"{left} gains more than the sum of {fmt.listing([describe(part) for part in claim.parts or ()])}",
        "best": f"{left} is the best of its phase",
        "monotone": f"{claim.direction} along {short(claim.setting or '')}",
        "arithmetic": f"{claim.expression} is {expected}",
    }
    text = words.get(claim.relation, f"{claim.relation} of {left} and {right}" if claim.right else claim.relation)
    relation = RELATIONS.get(claim.relation)  # None: of a plug-in that is not given now
    return f"{claim.metric}: {text}" if relation is None or relation.uses_trials else text


def _describe_campaign(name: str, root: Path, state: CampaignState) -> dict[str, Any]:
    """Returns how a campaign was run: the smallest and largest values of its trials, and the command to repeat it."""
    rules, data = state.campaign, state.campaign["data"]
    planned = {trial_id for phase in state.phases.values() for trial_id in phase.trial_ids}
    results = [result for trial_id, result in state.results.items() if trial_id in planned]

    def ends(values: Iterable[Any]) -> list[Any] | None:
        known = sorted(value for value in values if value)
        return [known[0], known[-1]] if known else None

    return {
        "campaign": name,
        "results": str(root),
        "device": rules["environment"].get("device"),
        "corpus": data.get("corpus"),
        "corpus_tokens": data.get("train_tokens"),
        **{name: ends(result["metrics"].get(name) for result in results) for name in ("n_params", "steps", "tokens")},
        "seeds": sorted({seed for phase in state.phases.values() for seed in phase.seeds}),
        "trials": len(results),
        "dates": ends((result["started_at"] or "")[:10] for result in results),
        **{name: rules[name] for name in ("confidence", "min_effect")},
        "metric": rules["metric"]["name"],
        "command": rules["command"],
    }


def total(ledger: Ledger) -> str:
    """`31 claims: 9 reproduced, 12 refuted, 6 undecided, 4 no data`."""
    listed = ", ".join(f"{count} {verdict}" for verdict, count in ledger.counts.items())
    return f"{fmt.counted(len(ledger.claims), 'claim')}: {listed}"


def ledger_markdown(ledger: Ledger, *, command: str = "") -> str:
    """Renders the ledger as a Markdown page that names the `command` that wrote it."""
    made = f" This page was written by `{fmt.plain(command)}`." if command else ""
    lines = "\n".join(f"{fmt.plain(campaign['command'])}    # {campaign['results']}" for campaign in ledger.campaigns)
    parts = ["# Claims", f"**{total(ledger)}.**"]
    parts += [f"Sentences of earlier reports, each tested by trials that were run for it.{made}"]
    parts += ["## The campaigns", _campaign_table(ledger.campaigns)]
    parts += [f"To run them again, and where their results are:\n\n```bash\n{lines}\n```"]
    for source in dict.fromkeys(entry.source for entry in ledger.claims):
        entries = [entry for entry in ledger.claims if entry.source == source]
        heading = f"Source {cell(source)}" if source else "Without a source"
        parts += [f"## {heading}", _claim_table(entries), "\n".join(map(_details, entries))]
    separately = "Campaigns are judged separately. One that cannot decide does not outweigh one that can; if two "
    separately += "decide differently, the claim is undecided."
    named = "A trial is named by its seed and by the first six digits of its id, as in its folder under `trials/`."
    parts += ["## How to read this", glossary(CLAIM_VERDICTS), f"{CLAIMS_NOTE} {separately}", named]
    return "\n\n".join(parts) + "\n"


def _claim_table(entries: Iterable[LedgerClaim]) -> str:
    """Returns a row per claim and campaign with data; only the first row of a claim repeats its text."""
    rows = []
    for entry in entries:
        claim = (entry.id, entry.says, entry.tested)
        for result in _shown(entry):
            where = result.campaign if result.trials else None
            rows.append((*claim, result.verdict_at_scale, _observed(result), result.n or None, where))
            claim = ("″", "″", "″")
    header = ("claim", "what was said", "tested as", "verdict", "observed", "seeds", "campaign")
    return markdown_table(header, rows, right=("seeds",))


def _observed(result: ClaimInCampaign) -> str:
    """Formats a value with its interval; a value without an interval (arithmetic) gets six digits."""
    if result.observed is not None and result.ci_low is None:
        return fmt.digits(result.observed, 6)
    return fmt.claim_value(result.observed, result.ci_low, result.ci_high)


def _details(entry: LedgerClaim) -> str:
    shown = _shown(entry)
    parts = []
    for result in shown:
        where = f"in {cell(result.campaign)}, " if len(shown) > 1 else ""
        parts.append(f"{where}{cell(fmt.sentence(result.why))}")
        parts += [f"Trials: {_trials(result.trials)}."] if result.trials else []
    if {result.verdict for result in shown} >= {"reproduced", "refuted"}:
        parts.append("The campaigns disagree, so it is undecided.")
    return f"- **{cell(entry.id)}**: {' '.join(parts)}"


def _shown(entry: LedgerClaim) -> list[ClaimInCampaign]:
    """Returns the results of the campaigns that have data on a claim; the first result if no campaign has."""
    informative = [result for result in entry.found if result.verdict != "no data"] or entry.found[:1]
    return informative if any(result.trials for result in informative) else informative[:1]  # arithmetic: all are equal


def _trials(trial_ids: Iterable[str]) -> str:
    """Formats trial ids by arm, since the seeds of an arm share a hash: `d70ab5 (seeds 1, 2, 3), f27752 (seed 1)`."""
    seeds: dict[str, list[str]] = {}
    for trial_id in trial_ids:
        arm, _, seed = trial_id.rpartition("-s")
        seeds.setdefault(arm[:SHORT_ID], []).append(seed)
    return ", ".join(
        f"{cell(arm)} (seed{'s' * (len(numbers) > 1)} {', '.join(numbers)})" for arm, numbers in seeds.items()
    )


def _campaign_table(campaigns: Iterable[Mapping[str, Any]]) -> str:
    header = ("campaign", "device", "data", "parameters", "steps", "tokens a trial", "seeds", "trials", "run on")
    rows = []
    for campaign in campaigns:
        corpus = Path(campaign["corpus"] or "").name or None  # without the folders of a path
        data = f"{corpus}, {fmt.count(campaign['corpus_tokens'])} tokens" if corpus else None
        sizes = [_range(campaign[name], fmt.count) for name in ("n_params", "steps", "tokens")]
        seeds, dates = fmt.listing(map(str, campaign["seeds"]), most=8), _range(campaign["dates"], str)
        rows.append((campaign["campaign"], campaign["device"], data, *sizes, seeds, campaign["trials"], dates))
    return markdown_table(header, rows, right=("trials",))


def _range(ends: Sequence[Any] | None, write: Callable[[Any], str]) -> str | None:
    """Formats a range: `13.7M to 52.8M`, or `0.8M` if its ends are written the same."""
    return " to ".join(dict.fromkeys(map(write, ends))) if ends else None
