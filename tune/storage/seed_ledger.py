"""The ledger of used seeds: `seeds.jsonl` beside the results directories says which seeds have been looked at.

A phase enters its seeds before its first trial starts. Seeds are counted per family: the contents of the corpus, the
size of the model and its kind (tune/planning/seeds.py). Each line is an entry with its CRC, as in the journal; a line
that a crash has torn is cut off. A file lock lets several campaigns run at once.

    {"campaign": "quickstart", "phase": "confirm", "family": "5f...", "seeds": [...], ..., "look": 1, ..., "crc": ...}
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ngpt.system.atomic_files import LineFile, make_folder
from tune.storage.journal import intact_length, line_with_crc, parse_line

LEDGER_FILE, LEDGER_LOCK = "seeds.jsonl", "seeds.lock"
LOCK_SECONDS = 30.0  # an entry takes milliseconds

Draw = Callable[[Collection[int], int], tuple[int, ...]]  # from the seeds already seen and the look to new seeds


@dataclass(frozen=True)
class SeedEntry:
    """Seeds that one phase of one campaign looks at; a line of the ledger."""

    campaign: str  # name of the results directory
    phase: str
    family: str
    seeds: tuple[int, ...] = ()
    content: str = ""  # what the phase trains (`plan_content`); empty for listed seeds
    question: str | None = None  # what a confirmation asks; None for other phases
    look: int = 0  # 1 for the first confirmation of this question; 0 if it is none
    file_sha256: str = ""  # of the campaign file
    time: str = ""  # UTC


def plan_content(identities: Iterable[str], n_seeds: int | None) -> str:
    """A digest of what a phase trains: its arms, by their trial ids without the seed, and the number of seeds."""
    text = json.dumps([sorted(set(identities)), n_seeds])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _checked(entry: SeedEntry) -> SeedEntry:
    """The entry; TypeError if a field of it has another type, since anybody may have written the line."""
    texts = (entry.campaign, entry.phase, entry.family, entry.content, entry.file_sha256, entry.time)
    are_right = all(isinstance(text, str) for text in (*texts, entry.question or ""))
    if not are_right or any(type(number) is not int or number < 0 for number in (entry.look, *entry.seeds)):
        raise TypeError("not an entry of the ledger")
    return entry


class SeedLedger:
    """The ledger in one results folder. Every method raises OSError if the file cannot be read or written."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._lock = FileLock(folder / LEDGER_LOCK)
        self.damaged: list[int] = []  # line numbers that could not be read, known after the first call

    def enter(self, entry: SeedEntry, draw: Draw) -> tuple[SeedEntry, bool]:
        """Returns the ledger's entry of this campaign, phase and content, and whether this call has added it.

        A new entry gets the seeds `draw(seen, look)`, where `seen` are all seeds of its family in the ledger. Its look
        is the number of entries with its question, itself included, or 0 if it has no question. The caller may crash at
        any time and ask again: nothing is drawn or counted twice.
        """
        with self._locked():
            entries, end = self._read()
            for known in entries:
                is_same = (known.campaign, known.content) == (entry.campaign, entry.content)
                # The same seeds under another name: the phase has been renamed.
                if is_same and (known.phase == entry.phase or known.seeds == entry.seeds):
                    return known, False
            seen = {seed for known in entries if known.family == entry.family for seed in known.seeds}
            look = 1 + sum(known.question == entry.question for known in entries) if entry.question else 0
            look = entry.look or look  # an entry that the ledger has lost keeps its look
            new = SeedEntry(**{**asdict(entry), "seeds": draw(seen, look), "look": look})
            return self._append(new, end), True

    def add_listed(self, entry: SeedEntry) -> set[int]:
        """Enters seeds that a campaign file lists; returns those that another phase or campaign has entered before."""
        with self._locked():
            entries, end = self._read()
            family = [known for known in entries if known.family == entry.family]
            own = (entry.campaign, entry.phase)
            if not set(entry.seeds) <= {seed for known in family for seed in known.seeds}:
                self._append(entry, end)
            others = {seed for known in family if (known.campaign, known.phase) != own for seed in known.seeds}
            return others & set(entry.seeds)

    def entries(self) -> list[SeedEntry]:
        """All entries, oldest first; empty if there is no ledger."""
        return self._read()[0]

    def _locked(self) -> Any:
        make_folder(self.path.parent)
        try:
            return self._lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            raise OSError(f"another process has locked {self._lock.lock_file} for {LOCK_SECONDS:.0f} s") from None

    def _read(self) -> tuple[list[SeedEntry], int]:
        """The entries, and the number of bytes before a line that a crash has torn."""
        if not self.path.exists():
            return [], 0
        raw = self.path.read_bytes()
        end = intact_length(raw)
        names = {field.name for field in fields(SeedEntry)}
        entries, self.damaged = [], []
        for number, line in enumerate(raw[:end].split(b"\n")[:-1], 1):
            record = parse_line(line)
            try:
                known = {name: value for name, value in (record or {}).items() if name in names}
                entries.append(_checked(SeedEntry(**{**known, "seeds": tuple(known["seeds"])})))
            except (KeyError, TypeError):
                self.damaged.append(number)
        return entries, end

    def _append(self, entry: SeedEntry, end: int) -> SeedEntry:
        record = asdict(entry) | {"seeds": list(entry.seeds), "time": datetime.now(UTC).isoformat(timespec="seconds")}
        if self.path.exists() and self.path.stat().st_size > end:
            with self.path.open("r+b") as file:
                file.truncate(end)
        file = LineFile(self.path)
        try:
            file.append(line_with_crc(record))
            file.sync()
        finally:
            file.close()
        return SeedEntry(**{**record, "seeds": entry.seeds})
