"""What a run records at its start: the event `campaign_started`, and the file `manifest.json`."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ngpt.config.base import flatten
from ngpt.plugins.records import describe
from tune.planning.changes import judging_rules
from tune.planning.plan import preview
from tune.session.executor_info import ExecutorInfo
from tune.spec.schema import Campaign
from tune.storage.state import CampaignState, added_trials


def started_fields(
    campaign: Campaign,
    executor: ExecutorInfo,
    *,
    command: str,
    environment: Mapping[str, Any],
    data: Mapping[str, Any],
    code_sha256: str,
) -> dict[str, Any]:
    """Returns the fields of the event `campaign_started`, in the order of the journal.

    Args:
        command: shell command that resumes the run.
        environment: software versions and device.
        data: describes the corpora.
        code_sha256: digest of the code that trains.
    """
    expected = preview(campaign)
    added = added_trials({phase.name: [trial.trial_id for trial in phase.trials] for phase in expected})
    return {
        "campaign": campaign.name,
        "description": campaign.description,
        "file_sha256": hashlib.sha256(campaign.text.encode()).hexdigest(),
        **judging_rules(campaign),
        "command": command,
        "workers": executor.workers,
        "dashboard_url": executor.dashboard_url,
        "environment": environment,
        "data": dict(data),
        "base": flatten(campaign.base),
        "code_sha256": code_sha256,
        **({"plugins": plugins} if (plugins := describe()) else {}),
        "stops_early": campaign.early_stop is not None,
        "smoke": campaign.smoke,
        "notes": list(executor.notes),
        "claims": [asdict(claim) for claim in campaign.claims],
        "expected_trials": {name: len(ids) for name, ids in added.items()},
        "most_trials": {one.name: len(added[one.name]) + one.later_trials for one in expected if one.most_seeds},
    }


def manifest(campaign: Campaign, executor: ExecutorInfo, state: CampaignState) -> dict[str, Any]:
    """Returns the content of `manifest.json`, after `campaign_started` has been applied to the state."""
    content = {name: state.campaign[name] for name in ("campaign", "command", "environment", "data")}
    content["notes"] = list(executor.notes)
    content["packing"] = state.gpu_sharing or None
    content["inherited"] = {path: asdict(winner) for path, winner in campaign.inherited.items()}
    content |= {"base": flatten(campaign.base), "settings": list(campaign.assignments)}
    if (resources := campaign.resources).ranks_per_trial > 1:
        content |= {"ranks_per_trial": resources.ranks_per_trial, "strategy": resources.strategy}
    return content | ({"plugins": plugins} if (plugins := describe()) else {})
