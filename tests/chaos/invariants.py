"""The invariants I1 to I9 of a results directory after any disturbance, compared with an undisturbed run.

    I1  every committed event of the journal matches its CRC and number; at most a torn last line, which is cut off
    I2  no synced event is lost, and no finished trial is trained again
    I3  no row appears twice, and every trial has one final record
    I4  after the first committed checkpoint there is always an intact one
    I5  the newest and the best checkpoints are always kept, and none is set aside as damaged
    I6  losses, curves, winners and final weights are bit-identical to those of the undisturbed run
    I7  every derived file equals one rebuilt from the journal and the metrics
    I8  a kill costs at most one checkpoint interval
    I9  a run ends with the right exit code and one line, without a traceback; no process or secret is left behind

A violation is a sentence that begins with its invariant.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.training.checkpoint import checkpoint_folders, verify_checkpoint
from ngpt.training.tracker import read_metrics
from tests.chaos.world import CANARIES, Ran, World
from tune.results.verify import verify
from tune.storage.journal import Event, JournalError, read_journal
from tune.storage.state import DONE

# Metrics that depend on the clock or the process.
TIMED = ("tokens_per_second", "peak_memory_bytes", "seconds", "train_seconds")
RECORDED = ("phase", "arm", "trial_id", "seed", "overrides", "status", "error")
JUDGED = ("arm", "n", "val_loss", "delta", "verdict", "score", "trial_ids")
CODES = {
    "kill": (0, -9),
    "half": (0, -9),
    "enospc": (0, 4, 74),
    "eio": (0, 4, 74),
    "full": (0, 4, 74),
}

EXPECTED = {
    "/checkpoints/": (0,),
    "/metrics.jsonl": (0,),
    "/histograms.jsonl": (0,),
    "/heartbeat": (0,),
    "/journal.jsonl": (74,),
}


@dataclass(frozen=True)
class Facts:
    """The results of a campaign that do not depend on the clock."""

    records: dict[str, Any]
    phases: dict[str, Any]
    rows: dict[str, Any]
    weights: dict[str, Any]


def facts(root: Path) -> Facts:
    """The facts of a finished results directory."""
    records, phases = {}, {}
    for file in sorted(root.glob("*/trials.jsonl")):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            metrics = {name: value for name, value in record["metrics"].items() if name not in TIMED}
            kept = {name: record[name] for name in RECORDED} | {"metrics": metrics}
            assert records.setdefault(f"{record['phase']} {record['trial_id']}", kept) is kept, f"I3 {file}: twice"
        summary = json.loads((file.parent / "summary.json").read_text())
        arms = [{name: arm[name] for name in JUDGED if name in arm} for arm in summary["arms"]]
        phases[file.parent.name] = {"winner": summary["winner"], "baseline": summary["baseline"], "arms": arms}
    trials = {record["trial_id"] for record in records.values()}
    rows = {trial_id: _rows(root, trial_id) for trial_id in sorted(trials)}
    return Facts(records, phases, rows, {trial_id: _weights(root, trial_id) for trial_id in sorted(trials)})


def _rows(root: Path, trial_id: str) -> list[Any]:
    folder = root / "trials" / trial_id
    numbers = [{k: v for k, v in row.items() if k not in TIMED} for row in read_metrics(folder / "metrics.jsonl")]
    return numbers + read_metrics(folder / "histograms.jsonl")


def _weights(root: Path, trial_id: str) -> Any:
    """Step and digest of the newest checkpoint's weights."""
    folders = checkpoint_folders(root / "trials" / trial_id / "checkpoints")
    if not folders:
        return None
    return folders[-1].name, hashlib.sha256((folders[-1] / "model.safetensors").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Acknowledged:
    """What was safe on disk when a run was stopped."""

    events: tuple[Event, ...] = ()
    steps: Mapping[str, tuple[int, ...]] | None = None  # all steps with a committed checkpoint, by trial


def check_stopped(root: Path, world: World, told: Acknowledged, *, one_missing: bool = False) -> Iterator[str]:
    """Checks I1, I2, I4, I5 and I8 on the directory that a stopped run has left, before any repair.

    `one_missing`: a fault of the disk may have cost one checkpoint.
    """
    try:
        events = read_journal(root / "journal.jsonl")
    except JournalError as error:
        yield f"I1 {error}"
        return
    if [*told.events] != events[: len(told.events)]:
        yield f"I2 the journal has {len(events)} events, and not all of the {len(told.events)} acknowledged ones"
    for folder in sorted((root / "trials").glob("*")):
        yield from _check_checkpoints(folder, world, (told.steps or {}).get(folder.name), one_missing)
    for trial_id in told.steps or {}:
        if not (root / "trials" / trial_id).is_dir():
            yield f"I4 trials/{trial_id} is gone, but had a committed checkpoint"


def _check_checkpoints(folder: Path, world: World, told: tuple[int, ...] | None, one_missing: bool) -> Iterator[str]:
    root = folder / "checkpoints"
    if damaged := sorted(path.name for path in root.glob("damaged-*")):
        yield f"I5 {folder.name}: {', '.join(damaged)}; no test had damaged it"
    there = []
    for path in checkpoint_folders(root):
        try:
            there.append(verify_checkpoint(path).step)
        except (OSError, ValueError) as error:
            yield f"I4 {folder.name}: {path.name} is not intact: {error}"
    newest = max(there, default=0)
    saved = told if told is not None else tuple(range(world.every, newest + 1, world.every))
    if saved and newest < saved[-1]:
        yield f"I4 {folder.name}: step {saved[-1]} was committed, and the newest intact one is {newest}"
    # One more checkpoint may have been committed just when the run was stopped.
    expected = {step for step in world_keeps(world, folder.name, saved) if step <= newest}
    superseded = world_keeps(world, folder.name, tuple(sorted({*saved, *there})))
    if lost := (expected & superseded) - set(there):
        yield f"I5 {folder.name}: steps {sorted(lost)} should have been kept, but only {there} exist"
    logged = max((row["step"] for row in read_metrics(folder / "metrics.jsonl")), default=0)
    if logged - newest > world.every * (2 if one_missing else 1):
        yield f"I8 {folder.name}: at step {logged}, and the newest checkpoint is of step {newest}"


def world_keeps(world: World, trial_id: str, saved: tuple[int, ...]) -> set[int]:
    """The saved steps to keep: the last and the best, by the losses of the undisturbed run."""
    rows = read_metrics(world.reference / "trials" / trial_id / "metrics.jsonl")
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    scored = [(losses[step], step) for step in saved if step in losses]
    return {*saved[-1:], *(step for _, step in sorted(scored)[:1])}


def check_finished(root: Path, world: World, undisturbed: Facts, told: Acknowledged) -> list[str]:
    """Checks I1, I2, I3, I5, I6, I7 and I9 after the same command has finished."""
    try:
        events = read_journal(root / "journal.jsonl")
        found = facts(root)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        return [f"I1 the results cannot be read: {error!r}"]
    broken = [] if [*told.events] == events[: len(told.events)] else ["I2 acknowledged events are lost"]
    broken += _trained_again(events)
    for name in ("records", "phases", "rows", "weights"):
        mine, theirs = getattr(found, name), getattr(undisturbed, name)
        if differing := [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]:
            broken.append(f"I6 {name} differ from the undisturbed run's: {', '.join(differing[:3])}")
    checked = verify(root)
    broken += [f"I7 {problem.path}: {problem.text}" for problem in checked.problems]
    broken += [f"I5 {note.path}: {note.text}" for note in checked.notes]  # leftover files
    return broken + [f"I9 {path} holds a secret" for path in secrets(root)]


def _trained_again(events: list[Event]) -> list[str]:
    done, broken = set(), []
    for event in events:
        if event["event"] == "trial_started" and event["trial_id"] in done:
            broken.append(f"I2 {event['trial_id']} was finished, but is trained again")
        if event["event"] == "trial_finished" and event["status"] in DONE:
            if event["trial_id"] in done:
                broken.append(f"I3 {event['trial_id']} has two results")
            done.add(event["trial_id"])
    return broken


def check_end(ran: Ran, fault: str, path: str) -> list[str]:
    """Checks I9 on the run that met a fault at `path`."""
    broken = []
    expected = CODES[fault]
    if fault in ("enospc", "eio"):  # a passing fault costs a trial nothing, but the journal is required
        expected = next((codes for part, codes in EXPECTED.items() if part in path), expected)
    if ran.code not in expected:
        broken.append(f"I9 exit code {ran.code} after {fault}: {_last(ran.err)}")
    if "Traceback" in ran.err:
        broken.append(f"I9 a traceback: {_last(ran.err)}")
    if ran.code == 74 and "space" not in _last(ran.err) and "Input/output" not in _last(ran.err):
        broken.append(f"I9 the last line does not say what happened: {_last(ran.err)}")
    return broken


def _last(err: str) -> str:
    return (err.strip().splitlines() or ["nothing was printed"])[-1]


def secrets(root: Path) -> list[str]:
    """Files that contain one of the canaries."""
    values = [value.encode() for value in CANARIES.values()]
    files = (path for path in root.rglob("*") if path.is_file())
    return [str(path) for path in files if any(value in path.read_bytes() for value in values)]
