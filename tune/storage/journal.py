"""The append-only truth of a campaign: one event a line, each with its CRC, synced to disk before it counts.

    {"seq": 7, "time": "2026-11-21T10:00:00+00:00", "event": "trial_finished", ..., "crc": "1c291ca3"}

The CRC is that of the bytes before it, so that ten thousand records are checked in milliseconds. Lines of the first
version have the CRC of the event with its keys in order; they are read as well.

A crash can only tear the last line: it ends early, or has zeros where a block never reached the disk. Opening for
writing cuts a torn tail off (kept beside as `journal.torn`), reading passes over it; anything else that does not match
its CRC is damage and is refused.
"""

import errno
import json
import zlib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ngpt.system.atomic_files import LineFile, write_atomic

Event = dict[str, Any]

ENDING = len(', "crc": "1c291ca3"}')


class JournalError(OSError):
    """The journal is damaged in a way that no crash of ours explains."""


class Journal:
    """A journal open for appending. Only the holder of the campaign's lock may have one."""

    def __init__(self, path: Path) -> None:
        self._path, self.events = path, read_journal(path)
        if path.exists():
            _cut_torn_tail(path)
        self._file = LineFile(path)
        self._failure: OSError | None = None

    def append(self, event: str, **fields: Any) -> Event:
        """Adds an event and returns it once it is on disk.

        Raises:
            OSError: the disk. Nothing can be appended from then on: whoever goes on has lost track of what the journal
                says, and two events with one number would make it unreadable for good.
        """
        if self._failure is not None:
            raise self._failure
        body = {"seq": len(self.events) + 1, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        text = json.dumps(body | {"event": event} | fields, allow_nan=False)
        self._write(text[:-1] + _ending(text.encode()[:-1]).decode())
        # As a reader will see it: tuples are lists now, and nothing is shared with the caller.
        self.events.append(json.loads(text))
        return self.events[-1]

    def _write(self, line: str) -> None:
        try:
            self._file.append(line)
            try:
                self._file.sync()
            except OSError:
                with suppress(OSError):  # then the next start finds an event that is true, but was not acted upon
                    self._file.take_back(line)
                raise
            if not self._path.exists():  # what goes to it now is lost with it, and nobody would be told
                raise FileNotFoundError(errno.ENOENT, "it was removed or moved while the campaign ran")
        except OSError as error:
            reason = error.strerror or str(error)
            self._failure = OSError(
                error.errno, f"{reason}; the campaign goes on with the same command", str(self._path)
            )
            raise self._failure from error

    def close(self) -> None:
        """Closes the file, and loses nothing: what `append` has returned is on disk."""
        self._file.close()


def read_journal(path: Path) -> list[Event]:
    """All committed events, in order; a torn last line is not one.

    Raises:
        JournalError: a line before the last does not match its CRC or its number.
    """
    if not path.is_file():
        return []
    raw = path.read_bytes()
    events: list[Event] = []
    for number, line in enumerate(raw[: whole_length(raw)].split(b"\n")[:-1], 1):
        event = parse_line(line)
        if event is None or event["seq"] != number:
            raise JournalError(f"{path}:{number}: this line does not match its CRC or its number; the file was changed")
        events.append(event)
    return events


def parse_line(line: bytes) -> Event | None:
    """The event of a line without its newline, or None if it does not match its CRC."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    crc = record.pop("crc", None)
    sound = line[-ENDING:] == _ending(line[:-ENDING]) or crc == _crc(record)
    return record if sound else None


def _ending(start: bytes) -> bytes:
    """How a line ends that starts so."""
    return f', "crc": "{zlib.crc32(start):08x}"}}'.encode()


def _crc(record: Event) -> str:
    """The CRC of an event with its keys in order."""
    return f"{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}"


def whole_length(raw: bytes) -> int:
    """How many bytes are not a torn tail. No line of ours has a zero byte in it."""
    end = raw.rfind(b"\n") + 1
    last = raw[:end].rfind(b"\n", 0, end - 1) + 1
    return last if b"\0" in raw[last:end] else end


def _cut_torn_tail(path: Path) -> None:
    raw = path.read_bytes()
    whole = whole_length(raw)
    if whole < len(raw):
        write_atomic(path.with_suffix(".torn"), raw[whole:])
        write_atomic(path, raw[:whole])
