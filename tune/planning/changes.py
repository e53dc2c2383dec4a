"""Lists how a campaign file differs from the results it continues, and refuses changes of their meaning.

Trials are identified by what they compute, so most changes are harmless: unchanged trials are kept, new ones are
trained. But a table whose metric, confidence, data or evaluation tokens were changed after the numbers were seen is a
different experiment under the same name. That needs `--allow-change`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ngpt.config.base import ConfigError, flatten, is_identity
from ngpt.data.dataset import fingerprint
from ngpt.training.config import TrainConfig
from tune import format as fmt
from tune.planning.forecast import expected_phases
from tune.spec.schema import Campaign
from tune.storage.state import DONE, CampaignState

FLAG = "--allow-change"
JUDGES = ("metric", "confidence", "min_effect", "hold")  # fields of `campaign_started`: how arms are compared
MEASURES = ("eval_tokens",)  # settings that decide on what, besides the data, which are identified by their content
MAX_LISTED_ARMS = 8


@dataclass(frozen=True)
class Changes:
    """The differences between a results directory and the file that continues it; empty for a new directory."""

    meaning: tuple[str, ...] = ()  # changes of the meaning of results, as `name: before -> now`
    settings: tuple[str, ...] = ()  # other changes of base settings
    kept: int = 0  # results that are still part of the campaign
    new: int = 0  # trials that were not part of it before
    changed: tuple[str, ...] = ()  # arms whose results do not count, since their trials have changed
    gone: tuple[str, ...] = ()  # arms whose results do not count, since the file no longer has them

    def lines(self) -> list[str]:
        """The differences as messages; none if nothing has changed."""
        found = [f"changed since the last start: {line}" for line in (*self.meaning, *self.settings)]
        if self.changed or self.gone or found:
            kept, new = fmt.counted(self.kept, "result"), fmt.counted(self.new, "trial")
            verbs = ["is" if n == 1 else "are" for n in (self.kept, self.new)]
            found.append(f"{kept} {verbs[0]} kept, {new} {verbs[1]} new")
        found += _listed("retrained because its settings changed", self.changed)
        return found + _listed("no longer part of the campaign", self.gone)


def find_changes(campaign: Campaign, state: CampaignState) -> Changes:
    """Compares `campaign` with the newest start and results. Raises a ConfigError if the corpus is missing."""
    results = {trial_id for trial_id, result in state.results.items() if result["status"] in DONE}
    if not state.campaign or not results:
        return Changes()
    planned = state.phases.values()
    before = {(phase.name, arm.name): set(arm.trial_ids.values()) for phase in planned for arm in phase.arms}
    phases = expected_phases(campaign, state)
    now = {(phase.name, arm.name) for phase in phases for arm in phase.arms}
    trials = {trial.trial_id for phase in phases for trial in phase.trials}
    lost = {arm: n for arm, ids in before.items() if (n := len(ids & results - trials))}
    counts = {arm: f"{fmt.plain(arm[0])}/{fmt.plain(arm[1])} ({fmt.counted(n, 'result')})" for arm, n in lost.items()}
    return Changes(
        meaning=tuple(_meaning(campaign, state)),
        settings=tuple(_settings(campaign, state)),
        kept=len(results & trials),
        new=len(trials - set().union(*before.values())),
        changed=tuple(text for arm, text in counts.items() if arm in now),
        gone=tuple(text for arm, text in counts.items() if arm not in now),
    )


def check_changes(changes: Changes, *, allowed: bool) -> None:
    """Raises a ConfigError with every change of the meaning of results, unless they are `allowed`."""
    if changes.meaning and not allowed:
        what = "\n".join(f"  {line}" for line in changes.meaning)
        text = f"this file would change the meaning of existing results:\n{what}\n"
        raise ConfigError(f"{text}choose another --out to keep both, undo the change, or use {FLAG} to continue anyway")


def judging_rules(campaign: Campaign) -> dict[str, Any]:
    """The settings that decide how arms are compared, as fields of `campaign_started`."""
    return {
        "metric": campaign.metric.model_dump(),
        "confidence": campaign.confidence,
        "min_effect": campaign.min_effect,
        "hold": {phase.name: phase.hold or campaign.hold for phase in campaign.phases},
    }


def _meaning(campaign: Campaign, state: CampaignState) -> Iterator[str]:
    before, now = state.campaign, judging_rules(campaign)
    for name in JUDGES:
        yield from _differences(name, before.get(name), now[name])
    base = flatten(campaign.base)
    for name in MEASURES:
        yield from _differences(name, before["base"].get(name), base[name])
    if before["data"]["fingerprint"] != (key := fingerprint(campaign.base.data)):
        sides = ((before["base"], before["data"]["fingerprint"]), (base, key))
        texts = [f"{fmt.plain(s['data.corpus'])} by {fmt.plain(s['data.tokenizer'])} ({found})" for s, found in sides]
        yield f"data: {' -> '.join(texts)}"


def _settings(campaign: Campaign, state: CampaignState) -> Iterator[str]:
    """Base settings that decide what is computed. A setting that an older version did not have had its default."""
    before, default = state.campaign["base"], flatten(TrainConfig())
    for name, value in flatten(campaign.base).items():
        if name not in MEASURES and not name.startswith("data.") and is_identity(TrainConfig, name):
            yield from _differences(name, before.get(name, _as_json(default[name])), value)


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    """A line for each difference; a value that only one side has is not one."""
    now = _as_json(now)
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() & now.keys():
            yield from _differences(f"{name}.{key}", before[key], now[key])
    elif before is not None and before != now:
        yield f"{name}: {fmt.value(before)} -> {fmt.value(now)}"


def _as_json(value: Any) -> Any:
    """A value as the journal stores it, with lists for tuples."""
    return json.loads(json.dumps(value))


def _listed(what: str, arms: tuple[str, ...]) -> list[str]:
    more = [f"{what}: {len(arms) - MAX_LISTED_ARMS} more arms"] if len(arms) > MAX_LISTED_ARMS else []
    return [f"{what}: {arm}" for arm in arms[:MAX_LISTED_ARMS]] + more
