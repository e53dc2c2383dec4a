"""The claims of several campaigns as one page: every claim once, by source, with what each campaign found.

A claim is the same in two campaigns if source, id and sentence are. Campaigns are judged each on its own, never pooled:
they differ in size, data or device. Together they say what those say that could decide; where one reproduced a claim
and another refuted it, it is undecided, and the page shows both.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError
from tune import format as fmt
from tune.claims.relations import RELATIONS
from tune.claims.selectors import describe, short
from tune.report.markdown import cell
from tune.report.wording import CLAIMS_NOTE
from tune.results.summary import own_claims, summarize_claims
from tune.spec.schema import Claim
from tune.storage.state import CampaignState, read_state

Ledger = dict[str, Any]

FOUND = ("verdict", "observed", "ci_low", "ci_high", "n", "trials", "why")  # what differs from campaign to campaign
SHORT = 6  # digits of a trial's hash, for people


def collect(roots: Sequence[Path], claims: Sequence[Claim] | None = None) -> Ledger:
    """The ledger of results directories: the claims of their own campaign files, or `claims` held against each.

    Returns strict JSON: `counts` by verdict, `claims` (id, source, says, tested, verdict, found), each with what every
    campaign found, and `campaigns` with where and how each was run.

    Raises:
        ConfigError: a directory has no campaign, or there is no claim at all.
    """
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    campaigns: dict[str, dict[str, Any]] = {}
    for root in dict.fromkeys(map(Path, map(os.path.normpath, roots))):  # `results/a/` is `results/a`
        state = read_state(root)
        name = state.campaign["campaign"]
        if name in campaigns:  # run twice, on another device, say
            name = f"{name} in {root}"
        campaigns[name] = {"campaign": name} | _about(root, state)
        judged = own_claims(state) if claims is None else claims
        for claim, entry in zip(judged, summarize_claims(state, judged), strict=True):
            known = {"id": claim.id, "source": claim.source, "says": claim.says, "tested": question(claim)}
            merged = entries.setdefault((claim.source, claim.id, claim.says), known | {"found": []})
            merged["found"].append({"campaign": name} | {field: entry[field] for field in FOUND})
    if not entries:
        raise ConfigError(f"no claims in {fmt.listing(map(str, roots))}; give a file that has some with --claims FILE")
    # By source, those without one last; within a source as they were written.
    ordered = sorted(entries.values(), key=lambda entry: (entry["source"] is None, entry["source"] or ""))
    for entry in ordered:
        entry["verdict"] = overall([found["verdict"] for found in entry["found"]])
    verdicts = [entry["verdict"] for entry in ordered]
    counts = {verdict: verdicts.count(verdict) for verdict in fmt.CLAIM_VERDICTS}
    return {"counts": counts, "claims": ordered, "campaigns": list(campaigns.values())}


def overall(verdicts: Sequence[str]) -> str:
    """What several campaigns say together: what those say that could decide, if they agree."""
    decided = {verdict for verdict in verdicts if verdict in ("reproduced", "refuted")}
    if len(decided) == 1:
        return decided.pop()
    return "undecided" if decided or "undecided" in verdicts else "no data"


def question(claim: Claim) -> str:
    """What the records are asked, for people: `val_loss: alpha=0.28 below alpha=0.05`."""
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


def total(ledger: Ledger) -> str:
    """`31 claims: 9 reproduced, 12 refuted, 6 undecided, 4 no data`."""
    n = len(ledger["claims"])
    listed = ", ".join(f"{count} {verdict}" for verdict, count in ledger["counts"].items())
    return f"{n} claim{'' if n == 1 else 's'}: {listed}"


def ledger_markdown(ledger: Ledger, *, command: str = "") -> str:
    """The page for people; `command` is how it was made."""
    made = f" This page was written by `{fmt.plain(command)}`." if command else ""
    parts = ["# Claims", f"**{total(ledger)}.**"]
    parts += [f"Sentences of earlier reports, each held against trials that were run for it.{made}"]
    parts += ["## The campaigns", _campaign_table(ledger["campaigns"]), _commands(ledger["campaigns"])]
    for source in dict.fromkeys(entry["source"] for entry in ledger["claims"]):
        entries = [entry for entry in ledger["claims"] if entry["source"] == source]
        heading = f"Source {cell(source)}" if source else "Without a source"
        parts += [f"## {heading}", _claim_table(entries), "\n".join(_details(entries))]
    meanings = "\n".join(f"- **{verdict}**: {meaning}" for verdict, meaning in fmt.CLAIM_VERDICTS.items())
    named = "A trial is named by the first six digits of its id, as the folder under `trials/` begins, and its seed."
    together = "Campaigns are judged one by one. One that cannot decide does not outweigh another that can; where two "
    together += "decide differently, the claim is undecided."
    return "\n\n".join([*parts, "## How to read this", meanings, f"{CLAIMS_NOTE} {together}", named]) + "\n"


def _claim_table(entries: Iterable[Mapping[str, Any]]) -> str:
    """A row for each claim and campaign that can say something of it; the claim itself stands in its first row only."""
    rows = []
    for entry in entries:
        said = (entry["id"], entry["says"], entry["tested"])
        for found in _shown(entry):
            where = found["campaign"] if found["trials"] else None
            rows.append((*said, found["verdict"], _observed(found), found["n"] or None, where))
            said = ("″", "″", "″")
    header = ("claim", "what was said", "tested as", "verdict", "observed", "seeds", "campaign")
    return _table(header, rows, right=("seeds",))


def _observed(found: Mapping[str, Any]) -> str:
    """A value with its interval; one without has the digits that it needs, as sums do."""
    exact = found["observed"] is not None and found["ci_low"] is None
    return f"{found['observed']:.6g}" if exact else fmt.claim_value(found)


def _details(entries: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """What came out for each claim, and the trials it rests on."""
    for entry in entries:
        shown = _shown(entry)
        parts = []
        for found in shown:
            where = f"in {cell(found['campaign'])}, " if len(shown) > 1 else ""
            parts.append(f"{where}{cell(fmt.sentence(found['why']))}")
            parts += [f"Trials: {_trials(found['trials'])}."] if found["trials"] else []
        if {found["verdict"] for found in shown} >= {"reproduced", "refuted"}:
            parts.append("The campaigns disagree, so it is undecided.")
        yield f"- **{cell(entry['id'])}**: {' '.join(parts)}"


def _shown(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What to print of a claim: the campaigns that have data on it, or else one line that says that none has."""
    telling = [found for found in entry["found"] if found["verdict"] != "no data"] or entry["found"][:1]
    return telling if any(found["trials"] for found in telling) else telling[:1]  # a sum is the same everywhere


def _trials(trial_ids: Iterable[str]) -> str:
    """`d70ab5 (seeds 1, 2, 3), f27752 (seeds 1, 2, 3)`: the seeds of an arm share the first part of their ids."""
    seeds: dict[str, list[str]] = {}
    for trial_id in trial_ids:
        arm, _, seed = trial_id.rpartition("-s")
        seeds.setdefault(arm[:SHORT], []).append(seed)
    return ", ".join(f"{cell(arm)} (seed{'s' * (len(own) > 1)} {', '.join(own)})" for arm, own in seeds.items())


def _about(root: Path, state: CampaignState) -> dict[str, Any]:
    """On what, with what and when a campaign was run: ranges over its trials, and the command that repeats it."""
    rules = state.campaign
    planned = {trial_id for phase in state.phases.values() for trial_id in phase.trial_ids}
    results = [result for trial_id, result in state.results.items() if trial_id in planned]
    measured = {
        name: sorted({result["metrics"][name] for result in results if result["metrics"].get(name)})
        for name in ("n_params", "steps", "tokens")
    }
    dates = sorted(result["started_at"][:10] for result in results if result["started_at"])
    return {
        "results": str(root),
        "device": rules["environment"].get("device"),
        "corpus": rules["data"].get("corpus"),
        "corpus_tokens": rules["data"].get("train_tokens"),
        **{name: [values[0], values[-1]] if values else None for name, values in measured.items()},
        "seeds": sorted({seed for phase in state.phases.values() for seed in phase.seeds}),
        "trials": len(results),
        "dates": [dates[0], dates[-1]] if dates else None,
        "confidence": rules["confidence"],
        "min_effect": rules["min_effect"],
        "metric": rules["metric"]["name"],
        "command": rules["command"],
    }


def _campaign_table(campaigns: Iterable[Mapping[str, Any]]) -> str:
    header = ("campaign", "device", "data", "parameters", "steps", "tokens a trial", "seeds", "trials", "run on")
    rows = []
    for about in campaigns:
        corpus = Path(about["corpus"] or "").name or None  # a path says where it lay, not what it is
        data = f"{corpus}, {fmt.count(about['corpus_tokens'])} tokens" if corpus else None
        sizes = [_range(about[name], fmt.count) for name in ("n_params", "steps", "tokens")]
        seeds = fmt.listing(map(str, about["seeds"]), most=8)
        rows.append(
            (about["campaign"], about["device"], data, *sizes, seeds, about["trials"], _range(about["dates"], str))
        )
    return _table(header, rows, right=("trials",))


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str]) -> str:
    lines = [header, ["---:" if name in right else "---" for name in header]]
    lines += [[cell(item) for item in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _range(ends: Sequence[Any] | None, write: Any) -> str | None:
    """`0.8M`, or `13.7M to 52.8M`."""
    return " to ".join(dict.fromkeys(map(write, ends))) if ends else None


def _commands(campaigns: Iterable[Mapping[str, Any]]) -> str:
    lines = "\n".join(f"{fmt.plain(about['command'])}    # {about['results']}" for about in campaigns)
    return f"To run them again, and where their results are:\n\n```bash\n{lines}\n```"
