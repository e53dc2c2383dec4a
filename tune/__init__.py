"""The campaign engine: plans, runs and judges many trials in parallel.

from tune import load_results, run

ended = run("experiments/quickstart.yaml", inline=True)
print(ended.results.arms.to_pandas())
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ngpt.config.base import ConfigError as ConfigError
    from tune.api import CampaignInterrupted as CampaignInterrupted
    from tune.api import CampaignRun as CampaignRun
    from tune.api import ComparedResults as ComparedResults
    from tune.api import Plan as Plan
    from tune.api import compare as compare
    from tune.api import load_campaign as load_campaign
    from tune.api import plan as plan
    from tune.api import run as run
    from tune.campaign_results import CampaignResults as CampaignResults
    from tune.campaign_results import load_results as load_results
    from tune.judged import Judged as Judged
    from tune.judged import judge as judge
    from tune.spec.schema import Campaign as Campaign
    from tune.storage.lock import ResultsLocked as ResultsLocked
    from tune.terminal.table import Table as Table

_MODULES = {
    "Campaign": "tune.spec.schema",
    "CampaignInterrupted": "tune.api",
    "CampaignResults": "tune.campaign_results",
    "CampaignRun": "tune.api",
    "ComparedResults": "tune.api",
    "ConfigError": "ngpt.config.base",
    "Judged": "tune.judged",
    "Plan": "tune.api",
    "ResultsLocked": "tune.storage.lock",
    "Table": "tune.terminal.table",
    "compare": "tune.api",
    "judge": "tune.judged",
    "load_campaign": "tune.api",
    "load_results": "tune.campaign_results",
    "plan": "tune.api",
    "run": "tune.api",
}
__all__ = [
    "Campaign",
    "CampaignInterrupted",
    "CampaignResults",
    "CampaignRun",
    "ComparedResults",
    "ConfigError",
    "Judged",
    "Plan",
    "ResultsLocked",
    "Table",
    "compare",
    "judge",
    "load_campaign",
    "load_results",
    "plan",
    "run",
]


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used, so that `import tune` stays fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that have not been imported yet."""
    return sorted({*globals(), *__all__})
