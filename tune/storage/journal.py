"""The append-only journal of a campaign: one event per line, with the CRC of the bytes before it.

    {"seq": 7, "time": "2026-11-21T10:00:00+00:00", "event": "trial_finished", ..., "crc": "1c291ca3"}

Each event is synced to disk. A crash can only tear the last line: it is cut off, or has zeros where a block never
reached the disk. Opening the journal for writing moves a torn line to `journal.torn`; reading ignores it. Any other
line that does not match its CRC raises JournalError.
"""

import errno
import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ngpt.config.base import printable
from ngpt.system.atomic_files import LineFile, naming, write_atomic
from tune.storage.events import event_problem

JOURNAL = "journal.jsonl"
Event = dict[str, Any]
CRC_FIELD_LENGTH = len(', "crc": "1c291ca3"}')


class JournalError(OSError):
    """The journal is damaged in a way that a crash cannot explain, or holds what no campaign writes."""


class Journal:
    """A journal open for appending. Only the holder of the campaign's lock may open it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.events = read_journal(path)
        raw = path.read_bytes() if path.exists() else b""
        if (intact := intact_length(raw)) < len(raw):
            write_atomic(path.with_suffix(".torn"), raw[intact:])
            write_atomic(path, raw[:intact])
        self._file = LineFile(path)
        self._failure: OSError | None = None

    def append(self, event: str, **fields: Any) -> Event:
        """Adds an event and returns it once it is on disk.

        Raises:
            OSError: writing failed. All later calls raise it again, since two events might get the same number.
            ValueError: no reader would accept the event.
        """
        if self._failure is not None:
            raise self._failure
        header = {"seq": len(self.events) + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        line = line_with_crc(header | {"event": event} | fields)
        # Decoded again, so that the event equals what a reader gets and shares no objects with the caller.
        decoded = {name: value for name, value in json.loads(line).items() if name != "crc"}
        if problem := event_problem(decoded):
            raise ValueError(f"this event could not be read again: {problem}")
        self._write(line)
        self.events.append(decoded)
        return self.events[-1]

    def _write(self, line: str) -> None:
        try:
            self._file.append(line)
            try:
                self._file.sync()
            except OSError:
                with suppress(OSError):  # otherwise a resume would read an event that was reported as failed
                    self._file.remove_last(line)
                raise
            if not self._path.exists():  # otherwise all further events would be lost without an error
                raise FileNotFoundError(errno.ENOENT, "it was removed or moved while the campaign ran")
        except OSError as error:
            text = f"{error.strerror or error}; run the same command again to resume"
            self._failure = OSError(error.errno, text, str(self._path))
            raise self._failure from error

    def close(self) -> None:
        """Closes the file. All events that `append` returned are on disk."""
        self._file.close()


def read_journal(path: Path) -> list[Event]:
    """Reads all events in order; ignores a torn last line.

    Raises:
        JournalError: a line before the last does not match its CRC or its number, or its event has wrong fields.
    """
    if not path.is_file():
        return []
    with naming(path):
        raw = path.read_bytes()
    events: list[Event] = []
    for number, event, problem in parse_lines(raw):
        if event is None:
            raise JournalError(f"{path}:{number}: this line {problem}")
        events.append(event)
    return events


def parse_lines(raw: bytes) -> Iterator[tuple[int, Event | None, str]]:
    """The lines before a torn one, with their numbers: the event, or None and what is wrong with the line."""
    for number, line in enumerate(raw[: intact_length(raw)].split(b"\n")[:-1], 1):
        event = parse_line(line)
        if event is None:
            yield number, None, "does not match its CRC; it was edited"
        elif event.get("seq") != number:
            yield number, None, f"has number {printable(repr(event.get('seq')), 40)}, not {number}"
        elif problem := event_problem(event):
            yield number, None, f"is not an event that this version can read: {problem}"
        else:
            yield number, event, ""


def line_with_crc(record: Event) -> str:
    """The line of a record, without its newline: JSON with the CRC of the bytes before it as the last field."""
    text = json.dumps(record, allow_nan=False)
    return text[:-1] + _crc_field(text.encode()[:-1]).decode()


def parse_line(line: bytes) -> Event | None:
    """Parses a line without its newline; returns None if it does not match its CRC."""
    try:
        record = json.loads(line)
        crc = record.pop("crc", None)
    except (ValueError, RecursionError, AttributeError, TypeError):  # not JSON, or not a mapping
        return None
    if line[-CRC_FIELD_LENGTH:] == _crc_field(line[:-CRC_FIELD_LENGTH]):
        return record
    try:  # the first version wrote the CRC of the event with sorted keys
        return record if crc == f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}" else None
    except RecursionError:
        return None


def _crc_field(payload: bytes) -> bytes:
    return f', "crc": "{zlib.crc32(payload):08x}"}}'.encode()


def intact_length(raw: bytes) -> int:
    """The number of bytes before a torn last line. A complete line contains no zero byte."""
    end = raw.rfind(b"\n") + 1
    last = raw[:end].rfind(b"\n", 0, end - 1) + 1
    return last if b"\0" in raw[last:end] else end
