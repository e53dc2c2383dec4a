"""`prune`: frees the disk space that finished trials no longer need.

That is the optimizer state of their checkpoints, which only serves to continue a trial, and checkpoints that a killed
process had not finished. Weights, metrics and the journal stay, and so does every file of a trial that may still
continue.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.base import ConfigError
from ngpt.runs.pruning import prunable_bytes, prune_state
from ngpt.system.atomic_files import describe_os_error, sync
from ngpt.training.checkpoint import checkpoint_folders
from tune import format as fmt
from tune.storage.journal import JOURNAL
from tune.storage.links import refuse_links
from tune.storage.lock import ResultsLock, refuse_if_running
from tune.storage.state import FINAL, CampaignState, read_state

STATES, LEFTOVERS = "optimizer states", "unfinished checkpoints"


@dataclass(frozen=True)
class Freed:
    """What was freed of one kind of file."""

    number: int
    bytes: int


@dataclass(frozen=True)
class Skipped:
    """A checkpoint of a finished trial that was left as it is."""

    path: str  # relative to the results directory
    text: str


@dataclass(frozen=True)
class Pruning:
    """Result of `prune`."""

    results: str
    dry_run: bool  # nothing was removed; the numbers say what would be
    bytes: int  # that were freed
    total_bytes: int  # of the results directory before
    kinds: Mapping[str, Freed]
    finished_trials: int
    other_trials: int  # with a folder of which everything was kept
    skipped: list[Skipped]


@dataclass(frozen=True)
class Part:
    """A folder of which something can be freed: a checkpoint's state, or all of an unfinished checkpoint."""

    path: Path
    kind: str
    bytes: int

    def free(self) -> None:
        """Removes it; a kill at any moment leaves nothing that looks damaged."""
        if self.kind == STATES:
            prune_state(self.path)
        else:
            shutil.rmtree(self.path)  # follows no link
            sync(self.path.parent)


def prune(root: Path, *, dry_run: bool = False) -> Pruning:
    """Frees what the finished trials of the results directory `root` no longer need; follows no link.

    Raises:
        ConfigError: there is no campaign in `root`.
        ResultsLocked: a campaign runs there.
        JournalError: the journal is damaged, so it does not say for sure which trials are finished.
        OSError: a file cannot be removed, or a trial's folder is a link; what was freed before stays freed.
    """
    if not (root / JOURNAL).is_file():
        raise ConfigError(f"{root} is not a results directory: it has no {JOURNAL}")
    if dry_run:  # needs no right to write
        refuse_if_running(root)
        return _prune(root, dry_run=True)
    with ResultsLock(root):
        return _prune(root, dry_run=False)


def _prune(root: Path, *, dry_run: bool) -> Pruning:
    state = read_state(root)
    refuse_links(root)
    trials = root / "trials"
    total = _tree_bytes(root) + (_tree_bytes(trials) if trials.is_symlink() else 0)
    finished = sorted(finished_trials(state))
    found = list(_parts(root, finished))
    parts = [part for part in found if isinstance(part, Part)]
    skipped = [part for part in found if isinstance(part, Skipped)]
    if not dry_run:
        for part in parts:
            part.free()
    kinds = {kind: _sum(part for part in parts if part.kind == kind) for kind in (STATES, LEFTOVERS)}
    folders = {path.name for path in trials.glob("*") if path.is_dir()}
    counts = len(folders.intersection(finished)), len(folders.difference(finished))
    return Pruning(str(root), dry_run, sum(part.bytes for part in parts), total, kinds, *counts, skipped)


def finished_trials(state: CampaignState) -> set[str]:
    """The ids of the trials that nothing continues any more.

    A failed trial is retried, and one that was stopped early continues if a later session stops none.
    """
    return {trial_id for trial_id, result in state.results.items() if result["status"] in FINAL}


def _parts(root: Path, trial_ids: Iterable[str]) -> Iterator[Part | Skipped]:
    """Yields what can be freed of these trials, older checkpoints first, and the checkpoints to leave as they are."""
    for trial_id in trial_ids:
        folder = root / "trials" / trial_id / "checkpoints"
        for path in checkpoint_folders(folder):
            try:
                if size := prunable_bytes(path):
                    yield Part(path, STATES, size)
            except (OSError, ValueError) as error:
                reason = describe_os_error(error) if isinstance(error, OSError) else str(error)
                yield Skipped(str(path.relative_to(root)), reason)
        for path in sorted(folder.glob(".tmp-*")):
            if path.is_dir() and not path.is_symlink():
                yield Part(path, LEFTOVERS, _tree_bytes(path))


def _sum(parts: Iterable[Part]) -> Freed:
    sizes = [part.bytes for part in parts]
    return Freed(len(sizes), sum(sizes))


def _tree_bytes(folder: Path) -> int:
    """The bytes of all files in a folder, without what links lead to."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths)


def pruning_text(pruning: Pruning) -> str:
    """Formats what was freed for the terminal."""
    lines = [
        f"{fmt.size(freed.bytes):>10}  {freed.number} {kind.removesuffix('s') if freed.number == 1 else kind}"
        for kind, freed in pruning.kinds.items()
        if freed.number
    ]
    lines += [f"{'kept':>10}  {fmt.plain(each.path)}: {fmt.plain(each.text)}" for each in pruning.skipped]
    verb = "would free" if pruning.dry_run else "freed"
    done = (
        f"{verb} {fmt.size(pruning.bytes)} of {fmt.size(pruning.total_bytes)}" if pruning.bytes else "nothing to free"
    )
    kept = [f"{fmt.counted(pruning.finished_trials, 'finished trial')}: all weights kept"]
    if pruning.other_trials:
        kept.append(f"{fmt.counted(pruning.other_trials, 'other trial')}: everything kept")
    return "\n".join([*lines, f"{fmt.plain(pruning.results)}: {done}; {', '.join(kept)}"])
