"""What a machine starts from: its own folder, or the copy in the store."""

from pathlib import Path

import pytest

from tests.helpers.stored_results import CHECKPOINT, METRICS, add_event, visible_files, write
from tune.remote.restore import prepare_local, restore
from tune.remote.store import ObjectStore, StoreError
from tune.remote.upload import Uploader


def prepare(store: ObjectStore, root: Path) -> list[str]:
    lines: list[str] = []
    prepare_local(store, root, checkpoints="unfinished", message=lines.append)
    return lines


def test_an_empty_store_is_nothing_to_restore(root: Path, store: ObjectStore, tmp_path: Path) -> None:
    assert not restore(store, tmp_path / "fresh", checkpoints="all", message=print)
    before = visible_files(root)
    assert prepare(store, root) == []
    assert visible_files(root) == before


def test_a_folder_that_is_ahead_of_the_store_stays(root: Path, store: ObjectStore) -> None:
    """The machine was killed before its last upload."""
    Uploader(root, store).upload()
    add_event(root)
    write(root / METRICS, "row 10\nrow 20\n")
    before = visible_files(root)
    assert prepare(store, root) == []
    assert visible_files(root) == before


def test_a_folder_that_is_behind_the_store_is_replaced(root: Path, store: ObjectStore, tmp_path: Path) -> None:
    Uploader(root, store).upload()
    other = tmp_path / "other" / "tiny"
    assert prepare(store, other) == ["restored from s3://bucket"]
    add_event(other)
    write(other / METRICS, "row 10\nrow 30\n")
    Uploader(other, store).upload()
    assert prepare(store, root) == ["restored from s3://bucket"]
    assert visible_files(root) == visible_files(other)


def test_a_folder_that_went_another_way_is_set_aside(root: Path, store: ObjectStore, tmp_path: Path) -> None:
    """This machine lost the store and trained on, while another one took over."""
    Uploader(root, store).upload()
    other = tmp_path / "other" / "tiny"
    prepare(store, other)
    for machine, row in ((other, "row 30"), (root, "row 40")):
        add_event(machine, row)
        write(machine / METRICS, f"row 10\n{row}\n")
    Uploader(other, store).upload()
    lost = visible_files(root)
    (gone_on, _) = prepare(store, root)
    assert "has gone on elsewhere" in gone_on and "tiny.aside-1" in gone_on
    assert visible_files(root.with_name("tiny.aside-1")) == lost
    assert visible_files(root) == visible_files(other)


def test_a_campaign_that_was_removed_from_the_store_does_not_come_back(
    root: Path, store: ObjectStore, bucket: Path
) -> None:
    Uploader(root, store).upload()
    bucket.rename(bucket.with_name("elsewhere"))
    (line,) = prepare(store, root)
    assert "was removed" in line
    assert not root.exists()


@pytest.mark.parametrize("name", [METRICS, CHECKPOINT])
def test_a_file_that_does_not_match_its_digest_is_left_out_and_named(
    root: Path, store: ObjectStore, bucket: Path, tmp_path: Path, name: str
) -> None:
    Uploader(root, store).upload()
    raw = bytearray((bucket / name).read_bytes())
    raw[2] ^= 1
    (bucket / name).write_bytes(raw)
    lines: list[str] = []
    assert restore(store, fresh := tmp_path / "fresh", checkpoints="all", message=lines.append)
    assert lines == [f"s3://bucket: {name} does not match its digest and is left out"]
    assert visible_files(root).keys() - visible_files(fresh).keys() == {name}


def test_a_journal_that_does_not_match_its_digest_is_an_error_and_leaves_nothing(
    root: Path, store: ObjectStore, bucket: Path, tmp_path: Path
) -> None:
    Uploader(root, store).upload()
    (bucket / "journal.jsonl").write_bytes(b"{}\n")
    with pytest.raises(StoreError, match=r"journal\.jsonl is missing or does not match"):
        restore(store, tmp_path / "new" / "tiny", checkpoints="all", message=print)
    assert list((tmp_path / "new").iterdir()) == []


def test_results_whose_list_is_damaged_are_not_taken_for_none(
    root: Path, store: ObjectStore, bucket: Path, tmp_path: Path
) -> None:
    Uploader(root, store).upload()
    (bucket / ".digests.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"\.digests\.json is damaged"):
        prepare(store, root)
    assert visible_files(root)


def test_a_trial_whose_list_is_damaged_is_left_out_and_uploaded_anew(
    root: Path, store: ObjectStore, bucket: Path, tmp_path: Path
) -> None:
    Uploader(root, store).upload()
    (bucket / "trials/a-s1/.digests.json").write_bytes(b"{")
    lines: list[str] = []
    assert restore(store, tmp_path / "fresh", checkpoints="all", message=lines.append)
    assert lines == ["s3://bucket: trials/a-s1/.digests.json does not match its digest and is left out"]
    write(root / METRICS, "row 10\nrow 20\n")
    Uploader(root, store).upload()
    assert restore(store, fresh := tmp_path / "again", checkpoints="all", message=print)
    assert visible_files(fresh) == visible_files(root)
