"""The tables of campaigns that plug-ins add to, besides those of single runs (ngpt/plugins/tables.py)."""

import json
from collections.abc import Sequence
from pathlib import Path

from ngpt.plugins.records import remember_plugins
from ngpt.plugins.tables import TABLES as RUN_TABLES
from ngpt.plugins.tables import WORD, Table
from ngpt.system.atomic_files import read_regular
from ngpt.system.cli import use_plugins

TABLES = (
    *RUN_TABLES,
    Table("sweep", "tune.spec.sweeps", "SWEEPS", ("axes",), pattern=WORD, reserved=("tune.campaign", "FIXED_KEYS")),
    Table(
        "relation",
        "tune.claims.relations",
        "RELATIONS",
        ("claim", "evidence"),
        wrapped=("Relation", "judge"),
        pattern=WORD,
    ),
)


def use_campaign_plugins(given: Sequence[str], results: Path | None = None) -> None:
    """Loads plug-ins as `ngpt.system.cli.use_plugins` does, for a campaign with its results in a folder.

    Messages about names that are unknown then say which plug-in gave them in an earlier run of the campaign.
    """
    use_plugins(given, TABLES)
    if results is not None:
        try:
            manifest = json.loads(read_regular(results / "manifest.json"))
        except (OSError, ValueError, RecursionError):  # no earlier run, or a damaged file, which `verify` reports
            return
        remember_plugins(manifest.get("plugins") if isinstance(manifest, dict) else None)
