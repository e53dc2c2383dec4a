"""Lists how a campaign file differs from its existing results, and rejects changes that alter their meaning.

A trial id is a hash of what the trial computes, so most changes are harmless: unchanged trials are kept, new ones are
trained. But changing the metric, confidence, data or evaluation tokens after seeing the results makes a different
experiment under the same name. That needs `--allow-change`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ngpt.config.base import ConfigError, flatten, is_identity
from ngpt.data.dataset import fingerprint
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.planning.forecast import expected_phases
from tune.planning.optuna_search import optuna_version
from tune.spec.schema import Campaign
from tune.storage.state import DONE, CampaignState

FLAG = "--allow-change"
JUDGING_FIELDS = ("metric", "confidence", "min_effect", "hold")  # fields of `campaign_started`: how arms are compared
EVALUATION_SETTINGS = ("eval_tokens",)  # what arms are evaluated on, in addition to the data
MAX_LISTED_ARMS = 8


@dataclass(frozen=True)
class Changes:
    """The differences between a results directory and the current campaign file; empty for a new directory."""

    meaning: tuple[str, ...] = ()  # changes that alter the meaning of results, as `name: before -> now`
    settings: tuple[str, ...] = ()  # other changed base settings
    kept: int = 0  # number of results that are still part of the campaign
    new: int = 0  # number of trials that were not part of it before; none of a phase that only waits for winners
    changed: tuple[str, ...] = ()  # arms whose results are unused because their settings changed
    reseeded: tuple[str, ...] = ()  # arms with results that are unused because their phase has other seeds
    gone: tuple[str, ...] = ()  # arms whose results are unused because the file dropped them
    notes: tuple[str, ...] = ()  # other differences that the user should know

    def lines(self) -> list[str]:
        """The differences as messages; empty if nothing has changed."""
        lines = [f"changed since the last start: {line}" for line in (*self.meaning, *self.settings)]
        if self.changed or self.reseeded or self.gone or lines:
            kept, new = fmt.counted(self.kept, "result"), fmt.counted(self.new, "trial")
            verbs = ["is" if n == 1 else "are" for n in (self.kept, self.new)]
            lines.append(f"{kept} {verbs[0]} kept, {new} {verbs[1]} new")
        lines += _listed("retrained because its settings changed", self.changed)
        lines += _listed("not used, since the phase has other seeds now", self.reseeded)
        return lines + _listed("no longer part of the campaign", self.gone) + list(self.notes)


def find_changes(campaign: Campaign, state: CampaignState) -> Changes:
    """Compares `campaign` with the last start and its results. Raises ConfigError if the corpus is missing."""
    results = {trial_id for trial_id, result in state.results.items() if result["status"] in DONE}
    if not state.campaign or not results:
        return Changes()
    planned = state.phases.values()
    before = {(phase.name, arm.name): arm.trial_ids for phase in planned for arm in phase.arms}
    phases = expected_phases(campaign, state)
    now = {(phase.name, arm.name): dict[int, str]() for phase in phases for arm in phase.arms}
    for phase in phases:
        for trial in phase.trials:
            now[phase.name, trial.arm][trial.seed] = trial.trial_id
    trials = {trial_id for ids in now.values() for trial_id in ids.values()}
    hold = state.campaign.get("hold")  # by phase: of all phases that the file had
    waiting = hold.keys() - state.phases.keys() if isinstance(hold, Mapping) else set()  # for winners, as before
    planned_now = {trial_id for (phase, _), ids in now.items() if phase not in waiting for trial_id in ids.values()}
    lost = {arm: n for arm, ids in before.items() if (n := len({*ids.values()} & results - trials))}
    counts = {arm: f"{fmt.plain(arm[0])}/{fmt.plain(arm[1])} ({fmt.counted(n, 'result')})" for arm, n in lost.items()}
    return Changes(
        meaning=tuple(_meaning(campaign, state)),
        settings=tuple(_settings(campaign, state)),
        kept=len(results & trials),
        new=len(planned_now - set().union(*(ids.values() for ids in before.values()))),
        changed=tuple(text for arm, text in counts.items() if arm in now and _is_other(before[arm], now[arm])),
        reseeded=tuple(text for arm, text in counts.items() if arm in now and not _is_other(before[arm], now[arm])),
        gone=tuple(text for arm, text in counts.items() if arm not in now),
        notes=tuple(_optuna_notes(campaign, state)),
    )


def check_changes(changes: Changes, *, allowed: bool) -> None:
    """Raises ConfigError with all changes that alter the meaning of results, unless they are `allowed`."""
    if changes.meaning and not allowed:
        lines = "\n".join(f"  {line}" for line in changes.meaning)
        text = f"this file would change the meaning of existing results:\n{lines}\n"
        raise ConfigError(f"{text}choose another --out to keep both, undo the change, or use {FLAG} to continue anyway")


def judging_rules(campaign: Campaign) -> dict[str, Any]:
    """The settings that decide how arms are compared, as fields of `campaign_started`."""
    return {
        "metric": campaign.metric.model_dump(),
        "confidence": campaign.confidence,
        "min_effect": campaign.min_effect,
        "hold": {phase.name: phase.hold or campaign.hold for phase in campaign.phases},
    }


def _is_other(before: Mapping[int, str], now: Mapping[int, str]) -> bool:
    """Whether an arm computes something else with a seed that it has kept; both are trial ids by seed."""
    return any(now.get(seed, trial_id) != trial_id for seed, trial_id in before.items())


def _meaning(campaign: Campaign, state: CampaignState) -> Iterator[str]:
    before, now, settings = state.campaign, judging_rules(campaign), state.campaign.get("base", {})
    for name in JUDGING_FIELDS:
        yield from _differences(name, before.get(name), now[name])
    base = flatten(campaign.base)
    for name in EVALUATION_SETTINGS:
        yield from _differences(name, settings.get(name), base[name])
    if before["data"]["fingerprint"] != (key := fingerprint(campaign.base.data)):
        data = before["data"]
        then = {"data.corpus": data["corpus"], "data.tokenizer": data["tokenizer"], **settings}
        versions = ((then, data["fingerprint"]), (base, key))
        texts = [f"{fmt.plain(s['data.corpus'])} by {fmt.plain(s['data.tokenizer'])} ({sha})" for s, sha in versions]
        yield f"data: {' -> '.join(texts)}"


def _settings(campaign: Campaign, state: CampaignState) -> Iterator[str]:
    """Yields changed base settings that affect results. A setting missing in an older journal had its default."""
    before, default = state.campaign.get("base", {}), flatten(TrainConfig())
    for name, value in flatten(campaign.base).items():
        if name not in EVALUATION_SETTINGS and not name.startswith("data.") and is_identity(TrainConfig, name):
            yield from _differences(name, before.get(name, _as_json(default[name])), value)


def _optuna_notes(campaign: Campaign, state: CampaignState) -> Iterator[str]:
    """Yields a line per search that another version of optuna began, and whose arms are replayed from the journal."""
    now = optuna_version()
    for phase in campaign.phases:
        record = state.searches.get(phase.name)
        if phase.search and record and record.question == phase.question and record.optuna not in (None, now):
            kept = fmt.counted(len(record.proposed), "arm")
            yield f"optuna {record.optuna} -> {now}: phase {phase.name} keeps its {kept}; new ones may differ"


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """Yields a line per changed value, recursing into dicts; ignores values that only one side has."""
    now = _as_json(now)
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from _differences(f"{name}.{key}", before[key], now[key])
    elif before is not None and before != now:
        yield f"{name}: {fmt.value(before)} -> {fmt.value(now)}"


def _as_json(value: Any) -> Any:
    """Converts a value to the form in the journal (tuples become lists)."""
    return json.loads(json.dumps(value))


def _listed(title: str, arms: tuple[str, ...]) -> list[str]:
    more = [f"{title}: {len(arms) - MAX_LISTED_ARMS} more arms"] if len(arms) > MAX_LISTED_ARMS else []
    return [f"{title}: {arm}" for arm in arms[:MAX_LISTED_ARMS]] + more
