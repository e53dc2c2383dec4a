"""Moves files of trials and phases that no longer count to `discarded/`, so that no reader counts them twice."""

from collections.abc import Callable
from pathlib import Path

from ngpt.system.atomic_files import move_folder
from tune.storage.state import CampaignState

DISCARDED = "discarded"  # folder in the results directory


def set_aside_trial(root: Path, state: CampaignState, trial_id: str) -> None:
    """Moves the files of a discarded trial away, before the event that it starts anew."""
    number, folder = state.discarded.get(trial_id), root / "trials" / trial_id
    if number is not None and folder.is_dir():
        move_folder(folder.absolute(), root.absolute() / DISCARDED / f"{trial_id}-{number}")


def set_aside_dropped_phases(root: Path, state: CampaignState, message: Callable[[str], None]) -> None:
    """Moves the folders of phases that the campaign no longer has; prints a line for each with `message`."""
    for name in state.dropped_phases():
        folder, aside = root / name, f"{DISCARDED}/{name}-{state.campaign['seq']}"
        if folder.is_dir() and not folder.is_symlink():
            move_folder(folder, root / aside)
            message(f"the campaign has no phase {name} any more; its files are in {aside}")
