"""`inherit: results/phase3/optimisation`: reads the winner of a phase in another results directory.

Its overrides are applied to the base of this campaign. They are read with the campaign file and kept in the manifest.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, settings, unknown_message
from ngpt.config.secrets import redact
from ngpt.training.config import TrainConfig
from tune.storage.journal import JOURNAL, Event, read_journal


@dataclass(frozen=True)
class InheritedWinner:
    """The winner of a phase in another results directory."""

    campaign: str
    phase: str
    winner: str
    overrides: dict[str, Any]  # by full dotted name
    finished_at: str  # when the phase finished, UTC
    seeds: tuple[int, ...] = ()  # of all phases that had started there


def is_path(name: object) -> bool:
    """Whether the value of `inherit:` is a path to a phase in another results directory; phase names have no slash."""
    return isinstance(name, str) and "/" in name


def read_inherited_winner(text: str) -> InheritedWinner:
    """Reads the winner of the phase at `text` (RESULTS/CAMPAIGN/PHASE). Raises ConfigError if there is no winner."""
    if "://" in text:
        advice = "copy its journal.jsonl to a folder DIR/CAMPAIGN, and write DIR/CAMPAIGN/PHASE"
        raise ConfigError(f"{redact(text)!r} is an address, and inherit reads a results directory here; {advice}")
    # Path.expanduser would raise for an unknown user, Path.is_dir for a path that is too long.
    root, name = Path(os.path.expanduser(text)).parent, Path(text).name
    if not os.path.isdir(root):
        raise ConfigError(f"there is no results directory {str(root)!r}; expected RESULTS/CAMPAIGN/PHASE")
    try:
        return _winner(read_journal(root / JOURNAL), text, root, name)
    except OSError as error:
        raise ConfigError(str(error)) from None


def _winner(events: Sequence[Event], text: str, root: Path, name: str) -> InheritedWinner:
    starts = [i for i, event in enumerate(events) if event["event"] == "campaign_started"]
    if not starts:
        raise ConfigError(f"{str(root)!r} is not a results directory: it has no journal.jsonl with a campaign in it")
    newest = events[starts[-1] :]
    phases = list(newest[0]["expected_trials"])
    if name not in phases:
        raise ConfigError(f"{unknown_message('phase', name, phases)} in {str(root)!r}")
    ends = [event for event in newest if event["event"] == "phase_finished" and event["phase"] == name]
    if not ends:
        raise ConfigError(f"phase {name!r} of {str(root)!r} has no winner yet: run that campaign to its end first")
    overrides = ends[-1]["winner_overrides"]
    if unknown_settings := sorted(overrides.keys() - settings(TrainConfig).keys()):
        names = ", ".join(unknown_settings)
        raise ConfigError(f"the winner of {text!r} uses settings that this version does not have: {names}")
    planned = (event["seeds"] for event in newest if event["event"] == "phase_planned")
    seeds = tuple(sorted(set[int]().union(*planned)))
    return InheritedWinner(newest[0]["campaign"], name, ends[-1]["winner"], overrides, ends[-1]["time"], seeds)
