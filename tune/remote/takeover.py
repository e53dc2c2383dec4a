"""What workers on other hosts have left in the store, for a run that trains such trials in its own folder or copies it.

A run that trains anew what its journal does not finish may train it on this host, or where all hosts share the folder.
Then the unit of the worker is taken over: downloaded if it is ahead, uploaded as part of the trial, and removed.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from tune.remote.parts import LOGS
from tune.remote.restore import download_files
from tune.remote.store import ObjectStore
from tune.remote.unit import (
    CHECKPOINTS,
    TRIALS,
    DamagedUnit,
    Digests,
    is_checkpoint,
    newest_step,
    object_key,
    read_digests,
    scan,
    worker_unit,
    write_digests,
)
from tune.remote.worker import OWNER
from tune.storage.names import ELSEWHERE
from tune.storage.state import FINAL, CampaignState


def find_elsewhere(store: ObjectStore, root: Path, state: CampaignState, *, everything: bool) -> list[str]:
    """The trials of which a worker has left files in the store, and marks those with checkpoints that are not here.

    Args:
        everything: whether trials that have ended count, too.
    """
    ended = {trial_id for trial_id, result in state.results.items() if result["status"] in FINAL}
    found: list[str] = []
    for trial_id in [*state.attempts, *state.discarded]:
        if trial_id in ended and not everything:
            continue
        mark = root / TRIALS / trial_id / ELSEWHERE
        mark.unlink(missing_ok=True)
        if digests := _digests(store, trial_id):
            found.append(trial_id)
            if trial_id in state.attempts and newest_step(digests) is not None:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch()
    return found


def take_over(store: ObjectStore, root: Path, trial_id: str, *, message: Callable[[str], None]) -> None:
    """Downloads what a worker has left of a trial into the folder of the trial, if that is ahead of what is there."""
    folder, digests = root / TRIALS / trial_id, _digests(store, trial_id)
    there, here = newest_step(digests), newest_step(scan(folder, is_root=False))
    (folder / ELSEWHERE).unlink(missing_ok=True)
    if there is None or (here is not None and there <= here):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".taking-", dir=root / TRIALS) as temp:
        damaged = download_files(store, worker_unit(trial_id), digests, Path(temp))
        _name_damaged(store, trial_id, damaged, message)
        if any(path in LOGS for path in damaged):  # a curve without its start would mislead
            return
        # Rows first, and the newest checkpoint last: after a kill, no checkpoint is ahead of its rows.
        for path in sorted(Path(temp).iterdir(), key=lambda path: path.name == CHECKPOINTS):
            if path.name == CHECKPOINTS:
                (folder / CHECKPOINTS).mkdir(exist_ok=True)
                for checkpoint in sorted(path.iterdir(), key=lambda each: (len(each.name), each.name)):
                    _move(checkpoint, folder / CHECKPOINTS / checkpoint.name)
            else:
                _move(path, folder / path.name)


def remove_worker_units(store: ObjectStore, trial_ids: Iterable[str]) -> None:
    """Removes what workers have left of trials, once the trials themselves have it."""
    for trial_id in trial_ids:
        unit, digests = worker_unit(trial_id), _digests(store, trial_id)
        write_digests(store, unit, {})
        for path in (*digests, OWNER):
            store.delete(object_key(unit, path))


def copy_checkpoints(store: ObjectStore, root: Path, *, message: Callable[[str], None]) -> None:
    """Downloads the checkpoints that workers have left of all trials into a copy of the results."""
    for path in (root / TRIALS).iterdir() if (root / TRIALS).exists() else ():
        wanted = {name: all_of for name, all_of in _digests(store, path.name).items() if is_checkpoint(name)}
        missing = {name: all_of for name, all_of in wanted.items() if not (path / name).exists()}
        _name_damaged(store, path.name, download_files(store, worker_unit(path.name), missing, path), message)


def _digests(store: ObjectStore, trial_id: str) -> Digests:
    try:
        return read_digests(store, worker_unit(trial_id)) or {}
    except DamagedUnit:
        return {}


def _name_damaged(store: ObjectStore, trial_id: str, paths: Iterable[str], message: Callable[[str], None]) -> None:
    for path in paths:
        message(f"{store.uri}: {object_key(worker_unit(trial_id), path)} does not match its digest and is left out")


def _move(path: Path, target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    path.replace(target)
