"""`inherit: results/phase3/optimisation`: a phase that starts from the winner of another results directory.

So a study can have one file per phase. What is taken over are the winner's overrides, as that directory's journal has
them; they come on top of this file's own base. They are read when the file is, and kept in the manifest.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.config.base import ConfigError, settings, unknown
from ngpt.training.config import TrainConfig
from tune.storage.journal import Event, read_journal


@dataclass(frozen=True)
class InheritedWinner:
    """The winner of a phase in another results directory."""

    campaign: str
    phase: str
    winner: str
    overrides: dict[str, Any]  # by full dotted name
    finished_at: str  # UTC


def is_path(name: object) -> bool:
    """Whether `inherit:` names a results directory and a phase in it; the name of a phase has no slash."""
    return isinstance(name, str) and "/" in name


def read_inherited_winner(text: str) -> InheritedWinner:
    """The winner that `text`, a results directory with the name of a phase at its end, stands for.

    Raises:
        ConfigError: there is no such directory, campaign or phase, it has no winner yet, or one of settings that do not
            exist here.
    """
    # Not Path.expanduser, which raises for a user that does not exist; nor Path.is_dir, for a path that is too long.
    root, name = Path(os.path.expanduser(text)).parent, Path(text).name
    if not os.path.isdir(root):
        raise ConfigError(f"there is no results directory {str(root)!r}; expected RESULTS/CAMPAIGN/PHASE")
    try:
        return _winner(read_journal(root / "journal.jsonl"), text, root, name)
    except OSError as error:
        raise ConfigError(str(error)) from None
    except (AttributeError, KeyError, TypeError):
        raise ConfigError(f"the journal of {str(root)!r} is not one of this version") from None


def _winner(events: Sequence[Event], text: str, root: Path, name: str) -> InheritedWinner:
    starts = [i for i, event in enumerate(events) if event["event"] == "campaign_started"]
    if not starts:
        raise ConfigError(f"{str(root)!r} is not a results directory: it has no journal.jsonl with a campaign in it")
    newest = events[starts[-1] :]
    phases = list(newest[0]["expected_trials"])
    if name not in phases:
        raise ConfigError(f"{unknown('phase', name, phases)} in {str(root)!r}")
    ends = [event for event in newest if event["event"] == "phase_finished" and event["phase"] == name]
    if not ends:
        raise ConfigError(f"phase {name!r} of {str(root)!r} has no winner yet: run that campaign to its end first")
    overrides = ends[-1]["winner_overrides"]
    if strange := sorted(overrides.keys() - settings(TrainConfig).keys()):
        raise ConfigError(f"the winner of {text!r} has settings that there are not here: {', '.join(strange)}")
    return InheritedWinner(newest[0]["campaign"], name, ends[-1]["winner"], overrides, ends[-1]["time"])
