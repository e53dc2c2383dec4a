"""The journal: appended events survive any crash, and damage raises instead of being read."""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tune.storage.journal import Journal, JournalError, read_journal

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
names = texts.filter(lambda name: name not in ("seq", "time", "event", "crc", "self"))
fields = st.dictionaries(names, values, max_size=4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, *names: str) -> bytes:
    journal = Journal(path)
    for name in names:
        journal.append(name, text="né\nw", value=0.1)
    journal.close()
    return path.read_bytes()


def names_in(path: Path) -> list[str]:
    return [event["event"] for event in read_journal(path)]


@given(st.lists(fields, max_size=5))
def test_events_are_read_back_as_they_were_appended(tmp_path_factory: Any, events: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path)
    appended = [journal.append("happened", **event) for event in events]
    journal.close()
    assert read_journal(path) == appended == journal.events
    for number, (event, given_fields) in enumerate(zip(appended, events, strict=True), 1):
        assert (event["seq"], event["event"]) == (number, "happened")
        assert {name: event[name] for name in given_fields} == given_fields


def test_a_missing_journal_reads_as_empty(path: Path) -> None:
    assert read_journal(path) == []


def test_every_line_is_strict_json(path: Path) -> None:
    for line in write(path, "one", "two").decode().splitlines():
        assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["crc"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_before_anything_is_written(path: Path, value: float) -> None:
    write(path, "one")
    journal = Journal(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        journal.append("two", loss=value)
    journal.append("three")
    journal.close()
    assert names_in(path) == ["one", "three"]


def test_an_appended_event_shares_nothing_with_the_caller(path: Path) -> None:
    journal, mutable = Journal(path), [1]
    event = journal.append("one", values=mutable, pair=(1, 2))
    mutable.append(2)
    journal.close()
    assert (event["values"], event["pair"]) == ([1], [1, 2])


def test_an_event_is_on_disk_when_append_returns(path: Path) -> None:
    journal = Journal(path)
    journal.append("one")
    assert names_in(path) == ["one"]
    journal.close()


def test_a_new_process_continues_the_numbering(path: Path) -> None:
    write(path, "one")
    write(path, "two", "three")
    assert [(event["seq"], event["event"]) for event in read_journal(path)] == [(1, "one"), (2, "two"), (3, "three")]


def test_a_last_line_torn_at_any_byte_loses_only_that_event(path: Path) -> None:
    before = write(path, "one", "two")
    whole = write(path, "three")
    for end in range(len(before), len(whole)):
        path.write_bytes(whole[:end])
        assert names_in(path) == ["one", "two"], f"{end - len(before)} bytes of the last line"
        write(path, "four")
        assert names_in(path) == ["one", "two", "four"]
        torn = path.with_suffix(".torn")
        assert (torn.read_bytes() if torn.exists() else b"") == whole[len(before) : end]
        torn.unlink(missing_ok=True)


@pytest.mark.parametrize("kept", [0, 10, 40])
def test_a_last_line_with_a_block_of_zeros_is_torn(path: Path, kept: int) -> None:
    """After a power loss a block may read as zeros, while later blocks with the end of the line are intact."""
    before, after = write(path, "one", "two"), write(path, "three")
    line = after[len(before) :]
    path.write_bytes(before + line[:kept] + bytes(len(line) - kept - 15) + line[-15:])
    assert names_in(path) == ["one", "two"]
    write(path, "four")
    assert names_in(path) == ["one", "two", "four"]
    assert path.with_suffix(".torn").read_bytes().endswith(line[-15:])


def test_zeros_in_an_older_line_are_damage(path: Path) -> None:
    whole = write(path, "one", "two")
    path.write_bytes(bytes(10) + whole[10:])
    with pytest.raises(JournalError, match=":1: "):
        read_journal(path)


@pytest.mark.parametrize("is_written", [True, False])
def test_after_a_failed_append_only_the_next_run_can_append(
    path: Path, monkeypatch: pytest.MonkeyPatch, is_written: bool
) -> None:
    write(path, "one")
    journal = Journal(path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(journal._file, "sync" if is_written else "append", refuse)
        with pytest.raises(OSError, match="No space left on device; run the same command again to resume"):
            journal.append("two")
    with pytest.raises(OSError, match="No space left"):  # a second event with its number would be damage
        journal.append("three")
    journal.close()
    assert [event["event"] for event in journal.events] == names_in(path) == ["one"]
    write(path, "four")
    assert [event["seq"] for event in read_journal(path)] == [1, 2]


@pytest.mark.parametrize("moved", [False, True])
def test_appending_to_a_removed_or_moved_journal_raises(path: Path, moved: bool) -> None:
    journal = Journal(path)
    journal.append("one")
    path.rename(path.with_name("elsewhere")) if moved else path.unlink()
    with pytest.raises(FileNotFoundError, match="it was removed or moved while the campaign ran") as raised:
        journal.append("two")
    assert raised.value.filename == str(path)
    journal.close()


def test_the_folder_of_a_new_journal_is_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    Journal(path).close()
    assert synced == [str(path.parent)]


def test_reading_does_not_change_a_torn_journal(path: Path) -> None:
    torn = write(path, "one", "two")[:-5]
    path.write_bytes(torn)
    read_journal(path)
    assert path.read_bytes() == torn


def test_a_flipped_bit_raises_with_the_line_number(path: Path) -> None:
    whole = write(path, "one", "two", "three")
    first, second = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1)
    for position in range(first, second):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(JournalError, match=r"journal\.jsonl:2: "):
                read_journal(path)


def test_the_crc_is_that_of_the_bytes_before_it(path: Path) -> None:
    for line in write(path, "one", "two").splitlines():
        start, ending = line.split(b', "crc": ')
        assert json.loads(ending[:-1]) == f"{zlib.crc32(start):08x}"


def test_a_journal_of_the_first_version_is_read_and_continued(path: Path) -> None:
    """Its CRC was that of the event with sorted keys."""
    event = {"seq": 1, "time": "2026-11-21T10:00:00.000+00:00", "event": "one", "b": {"z": 1, "a": [0.5, None]}}
    crc = f"{zlib.crc32(json.dumps(event, sort_keys=True).encode()):08x}"
    line = json.dumps(event | {"crc": crc}) + "\n"
    path.write_text(line)
    write(path, "two")
    assert read_journal(path)[0] == event and names_in(path) == ["one", "two"]
    path.write_text(line.replace("0.5", "0.6"))
    with pytest.raises(JournalError, match=":1: "):
        read_journal(path)


def test_a_damaged_journal_cannot_be_appended_to(path: Path) -> None:
    damaged = write(path, "one", "two").replace(b"one", b"won")
    path.write_bytes(damaged)
    with pytest.raises(JournalError):
        Journal(path)
    assert path.read_bytes() == damaged


def test_a_removed_line_raises(path: Path) -> None:
    lines = write(path, "one", "two", "three").splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(JournalError, match=":2: "):
        read_journal(path)
