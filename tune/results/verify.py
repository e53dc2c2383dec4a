"""`verify`: checks every file of a results directory and reports which damaged files can be rebuilt.

Journal lines carry a CRC and checkpoints carry digests. Records, summaries and curves are derived from the journal and
the trials' metrics, so they are rebuilt in a temporary folder and compared. Nothing in the directory is changed.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ngpt.code.version import command
from ngpt.config.base import ConfigError
from ngpt.system.atomic_files import read_regular
from ngpt.training.checkpoint import checkpoint_folders, verify_checkpoint
from tune import format as fmt
from tune.storage.journal import Event, JournalError, intact_length, parse_lines
from tune.storage.links import NOT_FOLLOWED, links_of_trials
from tune.storage.lock import is_locked
from tune.storage.state import DONE, FINAL, CampaignState, replay

UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # of files that anybody may have written
READERS = 4  # threads that check digests
REBUILD = f"{command()} report rebuilds it"
REWRITE = "run the campaign's command again to rewrite it"
BACKUP = "it can only be restored from a backup"
TRIAL_LOST = "its record is in the journal; the command of the campaign with --retrain trains it anew"
ROWS_LOST = "the result in the journal stands; the curve cannot be repaired"
LEFTOVER = "temporary file of a process that was killed; safe to remove"


@dataclass(frozen=True)
class Issue:
    """A problem with a file."""

    path: str  # relative to the results directory
    text: str
    remedy: str | None = None  # what to do; None if nothing needs to be done or nothing helps


class Note(Issue):
    """Something unusual about a file that is not a problem."""


@dataclass(frozen=True)
class Findings:
    """Result of `verify`."""

    results: str
    intact: bool
    checked: Mapping[str, int]  # number of files by kind
    problems: list[Issue]
    notes: list[Note]


@dataclass
class Directory:
    """A results directory and what its journal holds, as input to the checks."""

    root: Path
    events: list[Event]
    state: CampaignState
    running: bool  # another process holds its lock
    checked: dict[str, int] = field(default_factory=dict)  # number of files by kind
    pruned: list[Path] = field(default_factory=list)  # checkpoints without optimizer state

    @property
    def is_complete(self) -> bool:
        """Whether the newest session has ended, so that all its files have been written."""
        return self.state.ended and not self.running


def verify(root: Path) -> Findings:
    """Checks every file of the results directory `root`.

    Raises:
        ConfigError: there is no journal in `root`.
        OSError: a file cannot be read.
    """
    if not (root / "journal.jsonl").is_file():
        raise ConfigError(f"{root} is not a results directory: it has no journal.jsonl")
    events, issues = read_events(root)
    try:
        state = replay(events)
    except JournalError as error:  # the first line that does not fit those before it
        where, _, text = str(error).partition(": ")
        issues.append(Issue(where, text, BACKUP))
        events = events[: int(where.rpartition(":")[2]) - 1]
        state = replay(events)
    directory = Directory(root, events, state, is_locked(root))
    directory.checked["events"] = len(events)
    if directory.running:
        text = "a campaign is running here, so the files that it is still writing are not checked"
        issues.append(Note("campaign.lock", text))
    if directory.state.campaign:
        links = list(check_links(directory))
        # With a damaged journal, every file derived from it would look wrong.
        is_intact = all(isinstance(issue, Note) for issue in issues)
        checks = (check_heading, check_trials, check_checkpoints, check_pruned, check_derived)
        checks = checks if is_intact else (check_checkpoints,)
        for check in checks if not links else (check_heading,):
            issues += check(directory)
        issues += links
    elif not issues:
        issues.append(Note("journal.jsonl", "it contains no campaign"))
    # Only the first issue of each path is reported: later ones follow from it.
    causes = list({issue.path: issue for issue in reversed(issues)}.values())[::-1]
    problems = [issue for issue in causes if not isinstance(issue, Note)]
    notes = [issue for issue in causes if isinstance(issue, Note)]
    return Findings(str(root), not problems, directory.checked, problems, notes)


def read_events(root: Path) -> tuple[list[Event], list[Issue]]:
    """Returns the events before the first damaged line, and an issue for each damaged line."""
    raw = read_regular(root / "journal.jsonl")
    whole = intact_length(raw)
    events: list[Event] = []
    issues: list[Issue] = []
    for number, event, problem in parse_lines(raw):
        if event is None:
            issues.append(Issue(f"journal.jsonl:{number}", f"this line {problem}", BACKUP))
        elif not issues:
            events.append(event)
    if torn := len(raw) - whole:
        text = f"its last {torn} bytes are a line that a crash cut off; the next run moves them to journal.torn"
        issues.append(Note("journal.jsonl", text))
    return events, issues


def check_heading(directory: Directory) -> Iterator[Issue]:
    """Compares `manifest.json` and `campaign.yaml` with the newest start of the campaign."""
    started = directory.state.campaign
    manifest, problem = _read_json(directory.root / "manifest.json")
    fields = ("campaign", "command", "environment", "data", "base")
    # Older versions journaled fewer fields and no digest of the file.
    expected = {name: started[name] for name in fields if name in started}
    if problem is None and not (isinstance(manifest, dict) and manifest | expected == manifest):
        problem = "it differs from the newest start in the journal"
    if problem:
        yield Issue("manifest.json", problem, REWRITE)
    try:
        digest = _sha256(directory.root / "campaign.yaml")
        changed = digest != started.get("file_sha256", digest)
        problem = "it differs from the campaign file of the newest start" if changed else None
    except OSError as error:
        problem = _reason(error)
    if problem:
        yield Issue("campaign.yaml", problem, REWRITE)


def check_links(directory: Directory) -> Iterator[Issue]:
    """Finds links in the place of trials and their files, which could lead out of the results directory."""
    links = [str(path.relative_to(directory.root)) for path in links_of_trials(directory.root)]
    for path in links:
        yield Issue(path, NOT_FOLLOWED)
    if links:
        yield Note("trials", "trials, and what is derived from them, are not checked as long as there are links")


def check_trials(directory: Directory) -> Iterator[Issue]:
    """Compares each trial's settings and metrics with its result in the journal."""
    results = directory.state.results
    directory.checked["trials"] = len(results)
    for trial_id, result in results.items():
        folder = Path("trials", trial_id)
        if not (directory.root / folder).is_dir():
            yield Issue(str(folder), "the folder is missing", TRIAL_LOST)
            continue
        config, problem = _read_json(directory.root / folder / "config.json")
        if problem is None and config != result["config"]:
            problem = "its settings differ from the journal record"
        if problem:
            yield Issue(str(folder / "config.json"), problem, "the journal record has the correct settings")
        for name in ("metrics.jsonl", "histograms.jsonl"):
            path = directory.root / folder / name
            if (path.exists() or name == "metrics.jsonl") and (problem := _rows_problem(path, result)):
                yield Issue(str(folder / name), problem, ROWS_LOST)
    known = results.keys() | {event["trial_id"] for event in directory.events if event["event"] == "trial_started"}
    orphans: dict[tuple[str, str], list[str]] = {}
    for result in directory.state.orphans():
        orphans.setdefault((result["phase"], result["arm"]), []).append(result["trial_id"])
    for (phase, arm), trial_ids in orphans.items():
        more = f", and {len(trial_ids) - 1} more of the same arm" if len(trial_ids) > 1 else ""
        text = (
            f"no summary shows this trial{more}: the campaign has no arm {fmt.plain(arm)!r} of phase {fmt.plain(phase)}"
        )
        yield Note(f"trials/{trial_ids[0]}", f"{text} with these settings any more")
    for name in directory.state.dropped_phases():
        if (directory.root / name).is_dir():
            text = "the campaign has no phase of this name any more, so its tables are old"
            yield Note(name, text, "the next run moves the folder to discarded/")
    for path in sorted((directory.root / "trials").glob("*")):
        if path.name not in known:
            yield Note(f"trials/{path.name}", "it is not mentioned in the journal")


def _rows_problem(path: Path, result: Mapping[str, Any]) -> str | None:
    try:
        *lines, torn = read_regular(path).decode().split("\n")
        rows = [json.loads(line, parse_constant=_reject_constant) for line in lines]
        steps = [row["step"] for row in rows]
        is_ordered = steps == sorted(steps)
    except UNREADABLE as error:
        return _reason(error)
    if result["status"] not in DONE:
        return None
    if torn:
        return "its last line is cut off"
    if not is_ordered:
        return "its steps are out of order"
    last = next((row["val_loss"] for row in reversed(rows) if "val_loss" in row), None)
    is_curve = path.name == "metrics.jsonl" and result["status"] == "finished"
    is_wrong = is_curve and last != result["metrics"].get("val_loss")
    return "its last validation loss differs from the journal record" if is_wrong else None


def check_checkpoints(directory: Directory) -> Iterator[Issue]:
    """Checks each checkpoint against its manifest; a finished trial must have an intact checkpoint."""
    trials = {path.name: path for path in sorted((directory.root / "trials").glob("*")) if path.is_dir()}
    folders = [folder for path in trials.values() for folder in checkpoint_folders(path / "checkpoints")]
    directory.checked["checkpoints"] = len(folders)
    with ThreadPoolExecutor(READERS) as pool:
        checked = dict(zip(folders, pool.map(_check_checkpoint, folders), strict=True))
    problems = {folder: problem for folder, (problem, _) in checked.items()}
    for folder, problem in problems.items():
        if problem and folder.exists():  # a running campaign deletes old checkpoints
            remedy = "a resumed trial skips it and uses the previous checkpoint"
            yield Issue(str(folder.relative_to(directory.root)), problem, remedy)
    directory.pruned = [folder for folder, (_, is_pruned) in checked.items() if is_pruned]
    for trial_id, path in trials.items():
        root = path / "checkpoints"
        for leftover in [*root.glob("damaged-*"), *([] if directory.running else root.glob(".tmp-*"))]:
            is_damaged = leftover.name.startswith("damaged-")
            kind = "a damaged checkpoint that was set aside" if is_damaged else "an unfinished checkpoint"
            yield Note(str(leftover.relative_to(directory.root)), f"{kind}; safe to remove")
        status = directory.state.results.get(trial_id, {}).get("status")
        if status == "finished" and all(problems[folder] for folder in checkpoint_folders(root)):
            text = "the trial is finished but has no intact checkpoint: its result stands, its model is lost"
            yield Issue(str(root.relative_to(directory.root)), text, BACKUP)


def _check_checkpoint(folder: Path) -> tuple[str | None, bool]:
    """The problem of a checkpoint, if there is one, and whether its optimizer state was pruned."""
    try:
        checkpoint = verify_checkpoint(folder)
    except UNREADABLE as error:
        return _reason(error), False
    step = checkpoint.step
    problem = None if folder.name == f"step_{step:07d}" else f"its manifest says step {step}"
    return problem, checkpoint.is_pruned


def check_pruned(directory: Directory) -> Iterator[Issue]:
    """Notes how many checkpoints of finished trials are pruned; an unfinished trial cannot continue from one."""
    ended = {trial_id for trial_id, result in directory.state.results.items() if result["status"] in FINAL}
    needed = [folder for folder in directory.pruned if folder.parents[1].name not in ended]
    for folder in needed:
        text = "its optimizer state was pruned, but its trial is not finished, and cannot continue from it"
        yield Issue(
            str(folder.relative_to(directory.root)), text, "without its folder `checkpoints` it is trained anew"
        )
    if number := len(directory.pruned) - len(needed):
        text = f"the optimizer state of {fmt.counted(number, 'checkpoint')} of finished trials was pruned"
        yield Note("trials", f"{text}; their weights are whole")


def check_derived(directory: Directory) -> Iterator[Issue]:
    """Rebuilds records, summaries, curves and the report from the journal and compares them with the files."""
    from tune.results.summary import DIGESTS, sealed, write_campaign, write_phase

    state = directory.state
    digests, problem = _read_json(directory.root / DIGESTS)
    own_digest = digests.pop("sha256", None) if isinstance(digests, dict) else None
    if problem is None and (own_digest is None or sealed(digests)["sha256"] != own_digest):
        problem = "it does not match its own digest"
    if directory.is_complete and problem:
        yield Issue(DIGESTS, problem, REBUILD)
    digests = {} if problem else digests
    with tempfile.TemporaryDirectory() as name:
        rebuilt = Path(name)
        (rebuilt / "trials").symlink_to((directory.root / "trials").absolute())
        try:
            if directory.is_complete:
                write_campaign(rebuilt, state)
            else:  # the campaign summary is not written before the end
                for phase in state.phases.values():
                    if phase.winner is not None:
                        write_phase(rebuilt, state, phase)
        # `check_trials` reports the metrics files that cannot be read or parsed.
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            yield Issue(".", f"the derived files cannot be rebuilt from the journal: {_reason(error)}")
            return
        expected = {str(path.relative_to(rebuilt)): path for path in sorted(rebuilt.rglob("*")) if path.is_file()}
        expected.pop(DIGESTS, None)
        directory.checked["derived"] = len(expected)
        for name, digest in digests.items() if directory.is_complete else ():
            path = directory.root / name
            if name.startswith("trials/") and path.is_file() and _sha256(path) != digest:
                yield Issue(name, "it has changed since the campaign ended", ROWS_LOST)
        for name, path in expected.items():
            actual = directory.root / name
            if problem := _difference(path, actual):
                is_unchanged = actual.is_file() and _sha256(actual) == digests.get(name)
                note = Note(name, "unchanged, but written by another version or with other claims", REBUILD)
                yield note if is_unchanged else Issue(name, problem, REBUILD)
    for temporary in sorted(path for path in directory.root.rglob(".*.tmp") if not directory.running):
        yield Note(str(temporary.relative_to(directory.root)), LEFTOVER)


def _difference(rebuilt: Path, actual: Path) -> str | None:
    source = "trials/*/metrics.jsonl" if rebuilt.name == "curves.parquet" else "the journal"
    try:
        if read_regular(actual) == rebuilt.read_bytes():
            return None
        if rebuilt.suffix == ".parquet" and _is_same_table(rebuilt, actual):
            return None
    except (OSError, ValueError) as error:  # pyarrow raises both
        return _reason(error)
    return f"it was changed: it matches neither {source} nor its recorded digest"


def _is_same_table(one: Path, other: Path) -> bool:
    """Whether two files of different pyarrow versions, whose bytes may differ, hold the same table."""
    from pyarrow import parquet

    ours, theirs = parquet.read_metadata(one), parquet.read_metadata(other)
    if ours.created_by == theirs.created_by or ours.num_rows != theirs.num_rows:
        return False
    tables = [parquet.read_table(path, page_checksum_verification=True) for path in (one, other)]
    return tables[0].equals(tables[1])


def _sha256(path: Path) -> str:
    return hashlib.sha256(read_regular(path)).hexdigest()


def _read_json(path: Path) -> tuple[Any, str | None]:
    try:
        return json.loads(read_regular(path), parse_constant=_reject_constant), None
    except (OSError, ValueError, RecursionError) as error:
        return None, _reason(error)


def _reject_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _reason(error: Exception) -> str:
    """Returns the error on one line, without the path, which the issue already names."""
    if isinstance(error, OSError) and error.errno:
        return error.strerror or os.strerror(error.errno)
    return (str(error).splitlines() or [type(error).__name__])[0]


def verify_text(findings: Findings) -> str:
    """Formats the findings for the terminal, with one or two lines for each issue."""
    lines = []
    for issue in (*findings.problems, *findings.notes):
        kind = "note" if isinstance(issue, Note) else "problem"
        lines.append(f"{kind:8} {fmt.plain(issue.path)}: {fmt.plain(issue.text)}")
        lines += [f"{'':8} {fmt.plain(issue.remedy)}"] if issue.remedy else []
    checked = ", ".join(f"{n} {kind.removesuffix('s') if n == 1 else kind}" for kind, n in findings.checked.items())
    verdict = "intact" if findings.intact else fmt.counted(len(findings.problems), "problem")
    return "\n".join([*lines, f"{fmt.plain(findings.results)}: {verdict}; checked {checked}"])
