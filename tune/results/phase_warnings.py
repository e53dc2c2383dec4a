"""The warnings of a phase: why its numbers deserve less trust, from its trials, its code, its seeds and its ranges."""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import log

from tune import format as fmt
from tune.analysis.importance import is_number
from tune.storage.seed_ledger import LEDGER_FILE
from tune.storage.state import CampaignState, PhaseState
from tune.storage.summaries import ArmSummary, TrialRecord

EDGE = 0.1  # share of a search's range, at either end, in which the winner gets a warning
ORDINALS = ("", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def phase_warnings(
    state: CampaignState,
    phase: PhaseState,
    arms: Sequence[ArmSummary],
    winner: str,
    records: Sequence[TrialRecord],
    statuses: Sequence[str],
) -> list[str]:
    """Returns the warnings of a phase, one sentence each; those about its seeds come first.

    Args:
        arms: the arms as they are judged.
        winner: the name of the arm that leads.
        records: of the trials that have a result.
        statuses: of all planned trials; `missing` for those without a result.
    """
    warnings = [*_confirmation_warnings(phase), *_luck_warnings(state, phase)]
    if stopped := statuses.count("stopped"):
        text = f"stopped early by ASHA: {stopped} of {len(statuses)} trials; which ones depends on the order in which "
        text += "they ran. Their arms are listed last and not judged; the p-values of the others are corrected for "
        warnings.append(text + "them, too")
    chosen = next(arm for arm in arms if arm.arm == winner)
    if winner != phase.baseline:
        warnings += _edge_warnings(phase, chosen)
    tokens = {arm.arm: arm.tokens for arm in arms if arm.tokens is not None}
    if len(set(tokens.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in tokens.items())
        warnings.append(f"the arms saw different numbers of training tokens: {listed}")
    counted = [record for record in records if record.error is None]
    warnings += _unmeasured_warnings(records, state.campaign["metric"]["name"])
    warnings += state.notes
    warnings += _provenance_warnings(counted) + code_warnings(state, counted)
    for arm in arms:
        warnings += recovery_warnings(arm.arm, [record for record in records if record.arm == arm.arm])
    return warnings


def _unmeasured_warnings(records: Sequence[TrialRecord], objective: str) -> list[str]:
    """Returns warnings about metrics that finished trials lack; the judgement itself warns about the `objective`."""
    finished = [record for record in records if record.status == "finished"]
    lacking: dict[str, list[TrialRecord]] = {}
    for record in finished:
        for name in record.unmeasured:
            lacking.setdefault(name, []).append(record)
    warnings = []
    for name, without in lacking.items():
        if name == objective:
            continue
        seeds: dict[str, list[int]] = {}
        for record in without:
            seeds.setdefault(record.arm, []).append(record.seed)
        listed = fmt.listing((f"{arm} (seed {', '.join(map(str, sorted(s)))})" for arm, s in seeds.items()), most=4)
        none = {record.arm for record in finished} - {r.arm for r in finished if name not in r.unmeasured}
        text = f"{name} is missing or not finite in {len(without)} of {fmt.counted(len(finished), 'finished trial')}"
        text += f", which its means leave out: {listed}"
        warnings.append(text + (f"; {fmt.listing(sorted(none), most=4)} has no value of it at all" if none else ""))
    return warnings


def _edge_warnings(phase: PhaseState, chosen: ArmSummary) -> list[str]:
    warnings = []
    for setting, values in phase.swept.items():
        numbers = sorted(filter(is_number, values))
        value = chosen.overrides.get(setting)
        if len(numbers) > 2 and value in (numbers[0], numbers[-1]):
            end = "lower" if value == numbers[0] else "upper"
            warnings.append(
                f"the winner is at the {end} end of the range of {setting}; the best value may lie beyond it"
            )
    for setting, axis in phase.space.items():
        value = chosen.overrides.get(setting)
        if (
            axis["kind"] == "choice"
            or not is_number(value)
            or (axis["whole"] and axis["values"][1] - axis["values"][0] < 2)
        ):
            continue
        if end := _edge_of_range(value, *axis["values"], is_log=axis["kind"] == "log"):
            low, high = map(fmt.value, axis["values"])
            text = f"the winner's {setting} = {fmt.value(value)} is in the {end} tenth of the range [{low}, {high}]"
            warnings.append(f"{text}; the best value may lie beyond it")
    return warnings


def _edge_of_range(value: float, low: float, high: float, *, is_log: bool) -> str | None:
    """Returns `lower` or `upper` if the value lies in that tenth of the range of a search, on its own scale."""
    value = min(max(value, low), high)  # an end may be rounded
    share = log(value / low) / log(high / low) if is_log else (value - low) / (high - low)
    return "lower" if share <= EDGE else "upper" if share >= 1 - EDGE else None


def _provenance_warnings(records: Sequence[TrialRecord]) -> list[str]:
    warnings = []
    for name, what in {"device": "devices", "data_sha256": "data"}.items():
        different = {str(record.provenance.get(name)) for record in records}
        if len(different) > 1:
            warnings.append(f"its trials come from different {what}: {', '.join(sorted(different))}")
    for name, where in {"packed": "on a device", "vectorised": "in a process"}.items():
        numbers = {record.provenance.get(name, 1) for record in records}
        if len(numbers) > 1:
            counts = " and ".join(map(str, sorted(numbers)))
            warnings.append(f"its trials ran {counts} at a time {where}: their tokens per second cannot be compared")
    if len(numbers := {record.provenance.get("ranks", 1) for record in records}) > 1:
        counts = " and ".join(map(str, sorted(numbers)))
        text = f"its trials were trained on {counts} ranks: their losses agree within rounding"
        warnings.append(f"{text}, their tokens per second cannot be compared")
    warnings += _score_warnings(records)
    copied = Counter(str(origin) for record in records if (origin := record.provenance.get("copied_from")))
    for origin, n in copied.items():
        text = f"{n} of its {fmt.counted(len(records), 'trial')} continued files that the campaign {origin} had made"
        warnings.append(f"{text}, so they were trained there, at least in part")
    return warnings


def _score_warnings(records: Sequence[TrialRecord]) -> list[str]:
    """Returns a warning if downstream tasks have changed, or lm-eval was updated, between the trials of a phase."""
    contents: dict[str, set[str]] = {}
    versions = set()
    for record in records:
        about = record.provenance.get("evaluation") or {}
        for task, content in about.get("content", {}).items():
            contents.setdefault(task, set()).add(content)
        versions |= {about["lm_eval"]} if "lm_eval" in about else set()
    warnings = []
    if changed := [task for task, different in contents.items() if len(different) > 1]:
        text = f"its trials were given different examples or prompts of {fmt.listing(changed, most=4)}"
        warnings.append(f"{text}: their scores cannot be compared; another `limit` evaluates all of them again")
    if len(versions) > 1:
        listed = " and ".join(sorted(versions))
        warnings.append(f"its trials were evaluated by lm-eval {listed}, which may score the same answers differently")
    return warnings


def code_warnings(state: CampaignState, records: Sequence[TrialRecord]) -> list[str]:
    """Returns warnings about trials of a phase that other code has computed than that of the newest run."""
    of = f"of its {fmt.counted(len(records), 'trial')}"
    warnings = []
    tables = {"trained by other code than that of the newest run, and kept": state.kept_code}
    tables["begun by other code and continued by that of the newest run"] = state.mixed_code
    for what, table in tables.items():
        changed = [table[record.trial_id] for record in records if record.trial_id in table]
        if changed:
            files = ", ".join(sorted({name for names in changed for name in names}))
            warnings.append(f"{len(changed)} {of} {'was' if len(changed) == 1 else 'were'} {what}: {files}")
    versions = Counter(str(record.provenance.get("code_sha256")) for record in records)
    unknown = {version: n for version, n in versions.items() if version not in state.code_versions}
    if unknown and len(versions) > 1:
        warnings.append(
            f"the code of {sum(unknown.values())} {of} is not known and may differ: {', '.join(sorted(unknown))}"
        )
    return warnings


def recovery_warnings(arm: str, records: Sequence[TrialRecord]) -> list[str]:
    """Returns warnings about recoveries that made trials of an arm deviate from their settings."""
    warnings = []
    if replaced := sum(record.metrics.get("r_replaced") or 0 for record in records):
        warnings.append(f"{arm}: {replaced:.0f} divisors r of its norm mode were not finite and became 1")
    sizes = [(record.metrics.get("batch_size"), record.config.get("batch_size")) for record in records]
    halved = [f"{size} instead of {planned}" for size, planned in sizes if size and planned and size < planned]
    if halved:
        text = (
            f"{len(halved)} of its trials ran out of memory and halved {'its' if len(halved) == 1 else 'their'} batch"
        )
        warnings.append(f"{arm}: {text} ({', '.join(sorted(set(halved)))})")
    for name, what in {"skipped_steps": "skipped steps", "rollbacks": "rollbacks to a checkpoint"}.items():
        if count := sum(record.metrics.get(name) or 0 for record in records):
            warnings.append(f"{arm}: {count:.0f} {what}, because a loss or gradient was not finite")
    return warnings


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
    """Warns if the trials of the baseline are those with which it won an earlier phase, or was the best of it."""
    name = phase.inherit
    while name in state.phases:
        earlier = state.phases[name]
        if earlier.winner and (earlier.winner != earlier.baseline or (earlier.hands_on_best and earlier.best)):
            searched = state.phases.get(earlier.confirms or "", earlier)
            for each in (earlier, searched):
                if set(each.seeds) & set(phase.seeds):
                    how = "won" if each.winner != each.baseline else "was the best of"
                    text = f"its baseline {how} phase {each.name} with the same trials, so its luck is in every"
                    yield f"{text} difference: leave out `seeds:` to train it on other seeds"
                    break
            return
        name = earlier.inherit
