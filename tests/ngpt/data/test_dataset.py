"""Preparing and opening a corpus: splits, fingerprints, corrupt shards and errors."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ngpt.config.base import ConfigError, build, override
from ngpt.data import prepare as preparation
from ngpt.data import sources
from ngpt.data.__main__ import main
from ngpt.data.dataset import DataConfig, Dataset, fingerprint, open_dataset, order_settings, prepare, vocab_size
from ngpt.data.text import documents
from ngpt.data.text import python_docs as docstrings
from ngpt.data.tokens.shards import CorruptShardError, write_shard
from ngpt.data.tokens.tokenizer import load_tokenizer
from ngpt.training.config import TrainConfig, resolved
from tests.helpers.vocabularies import write_gpt2


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two training shards and one for validation, 300 tokens of vocabulary."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, name in enumerate(("a_train_0.bin", "a_train_1.bin", "a_val_0.bin")):
        write_shard(folder / name, np.arange(100 * index, 100 * index + 100), vocab_size=300)
    return folder


def texts(dataset: Dataset, config: DataConfig) -> dict[str, str]:
    tokenizer = load_tokenizer(config.tokenizer, dataset.folder)
    return {
        "train": tokenizer.decode(np.concatenate(dataset.train)),
        "val": tokenizer.decode(np.concatenate(dataset.val)),
    }


def test_a_text_is_split_by_position_and_decodes_unchanged(data: DataConfig, corpus: Path, dataset: Dataset) -> None:
    whole = corpus.read_text()
    split = texts(dataset, data)
    assert split["train"] == whole[: int(len(whole) * 0.9)] and split["val"] == whole[int(len(whole) * 0.9) :]


def test_the_manifest_accounts_for_every_token_and_byte(data: DataConfig, corpus: Path, dataset: Dataset) -> None:
    manifest = json.loads((dataset.folder / "manifest.json").read_text())
    assert manifest == dataset.manifest
    assert manifest["content_sha256"] == hashlib.sha256(corpus.read_bytes()).hexdigest()
    assert manifest["fingerprint"] == fingerprint(data) and manifest["vocab_size"] == 400 == vocab_size(data)
    model = (dataset.folder / "tokenizer.model").read_bytes()
    assert manifest["tokenizer"] == {
        "spec": "sentencepiece:400",
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    assert dataset.token_bytes is not None
    for split, arrays in (("train", dataset.train), ("val", dataset.val)):
        counts = manifest["splits"][split]
        assert counts["tokens"] == sum(map(len, arrays))
        assert counts["bytes"] == len(texts(dataset, data)[split].encode())
        assert counts["bytes"] == sum(dataset.token_bytes[array].sum() for array in arrays)
        for entry in counts["shards"]:
            stored = (dataset.folder / entry["name"]).read_bytes()
            assert (entry["size"], entry["crc32"]) == (len(stored), zlib.crc32(stored[1024:]))


@pytest.mark.slow
def test_python_docs_holds_the_docstrings_and_topics_of_this_python(own_cache: Path) -> None:
    config = DataConfig()
    split = texts(open_dataset(config), config)
    whole = split["train"] + split["val"]
    assert "Class definitions\n*****************" in whole  # pydoc topic
    assert json.__doc__ is not None and json.__doc__.strip().splitlines()[0] in whole
    assert len(whole) > 1_000_000
    assert 0.05 < len(split["val"]) / len(whole) < 0.15
    ends = [document for document in docstrings.python_documents() if document in split["val"]]
    assert "".join(ends) == split["val"]  # whole documents, in order


def test_a_folder_of_texts_is_read_by_name_with_its_line_ends(tmp_path: Path, own_cache: Path, corpus: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\r\nlast line\r\n" * 200)
    (folder / "a.md").write_text(corpus.read_text()[:20_000])
    (folder / "sub" / "c.txt").write_text("the end")
    (folder / ".hidden").write_bytes(b"\xff")
    config = DataConfig(corpus=str(folder), tokenizer="sentencepiece:400")
    split = texts(open_dataset(config), config)
    in_order = b"".join((folder / name).read_bytes() for name in ("a.md", "b.txt", "sub/c.txt"))
    assert (split["train"] + split["val"]).encode() == in_order


def test_names_may_be_long_and_hold_bytes_that_are_no_text(tmp_path: Path, own_cache: Path) -> None:
    folder = tmp_path / ("\u8a9e" * 80)  # 240 bytes
    folder.mkdir()
    for name in (b"caf\xe9 \x1b[31m\n.txt", b"d\xff.txt"):
        (folder / os.fsdecode(name)).write_text(f"once upon a time, {name}\n" * 200)
    dataset = open_dataset(DataConfig(corpus=str(folder), tokenizer="sentencepiece:300"))
    assert dataset.folder.name.startswith("\u8a9e" * 60)
    assert [os.fsencode(name) for name in dataset.manifest["files"]["train"]] == [
        b"caf\xe9 \x1b[31m\n.txt",
        b"d\xff.txt",
    ]


def test_copies_of_a_text_are_said(tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("once upon a time there was a text\n" * 200)
    (tmp_path / "a (1).txt").write_text((tmp_path / "a.txt").read_text())
    (tmp_path / "b.txt").write_text("and another one\n" * 200)
    assert main([str(tmp_path), "--tokenizer", "sentencepiece:300"]) == 0
    assert (
        "warning: a.txt repeats the text of a (1).txt: what is trained on may be in val too\n"
        in capsys.readouterr().err
    )


ROWS = [{"body": {"text": f"Page {number} of the book.\n" * 9}, "text": f"{number}. "} for number in range(60)]


@pytest.fixture
def gpt2(tmp_path: Path) -> str:
    return f"gpt2:{write_gpt2(tmp_path / 'gpt2')}"


def prepared(path: Path, gpt2: str, **settings: Any) -> dict[str, Any]:
    return open_dataset(DataConfig(corpus=str(path), tokenizer=gpt2, **settings)).manifest


def test_documents_are_the_same_corpus_in_every_layout_of_json(tmp_path: Path, own_cache: Path, gpt2: str) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.json").write_bytes(lines)
    (tmp_path / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(ROWS, indent=1).encode()))
    names = ("a.jsonl", "a.json", "a.ndjson", "array.json.gz")
    manifests = [prepared(tmp_path / name, gpt2) for name in names]
    assert len({manifest["content_sha256"] for manifest in manifests}) == 1
    assert sum(split["bytes"] for split in manifests[0]["splits"].values()) == sum(len(row["text"]) for row in ROWS)
    nested = prepared(tmp_path / "a.jsonl", gpt2, text_column="body.text")
    assert nested["fingerprint"] != manifests[0]["fingerprint"]
    assert sum(split["bytes"] for split in nested["splits"].values()) == sum(len(row["body"]["text"]) for row in ROWS)


def test_what_is_left_out_of_documents_is_said_and_counted(
    tmp_path: Path, own_cache: Path, gpt2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    rows = [*ROWS, {"text": None}, {"text": ""}, {"text": None}]
    (folder / "a.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "README.md").write_text("about")
    assert main([str(folder), "--tokenizer", gpt2, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["left_out"] == {"null": 2, "empty": 1, "files": ["README.md"]}
    assert "docs: documents from 1 file (1 json lines); left out: README.md\n" in captured.err
    assert "docs: 2 documents left out: null\n" in captured.err


def test_a_byte_order_mark_is_not_learnt(tmp_path: Path, own_cache: Path, gpt2: str) -> None:
    config = DataConfig(corpus=str(tmp_path / "a.txt"), tokenizer=gpt2)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"one two\n" * 90)
    assert texts(open_dataset(config), config)["train"].startswith("one two\n")


@pytest.mark.parametrize("corpus", ["python-docs", "shards", "a.txt"])
def test_a_text_column_is_refused_where_there_are_no_columns(corpus: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    name = corpus if corpus == "python-docs" else str(tmp_path / corpus)
    with pytest.raises(ConfigError, match=r"data\.text_column body is for documents"):
        fingerprint(DataConfig(corpus=name, text_column="body"))


def test_long_texts_are_cut_into_shards_and_lose_nothing(
    data: DataConfig, dataset: Dataset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(documents, "BLOCK", 4096)
    cut = open_dataset(data)
    assert [len(shard) for shard in cut.train[:-1]] == [1000] * (len(cut.train) - 1) and len(cut.train) > 5
    assert texts(cut, data) == texts(dataset, data)


def test_preparing_again_touches_nothing(data: DataConfig, dataset: Dataset) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in dataset.folder.iterdir()}
    said: list[str] = []
    assert prepare(data, log=said.append) == dataset.folder
    assert {path.name: path.stat().st_mtime_ns for path in dataset.folder.iterdir()} == before and not said


def test_a_failed_preparation_leaves_nothing_behind(
    data: DataConfig, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "write_shard", full)
    with pytest.raises(OSError, match="No space"):
        prepare(data)
    assert [path.suffix for path in own_cache.iterdir()] == [".lock"]


def test_documents_of_train_that_are_held_out_too_are_said_and_counted(
    tmp_path: Path, own_cache: Path, gpt2: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in (("train", ROWS[:40]), ("val", ROWS[35:50]), ("test", [ROWS[0], ROWS[59]])):
        (tmp_path / "docs" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "docs" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(tmp_path / "docs"), "--tokenizer", gpt2, "--json"]) == 0
    captured = capsys.readouterr()
    assert "docs: warning: val and test hold 6 documents of train, too\n" in captured.err
    assert json.loads(captured.out)["repeated"] == 6


def test_leftovers_of_a_killed_preparation_are_removed(data: DataConfig, own_cache: Path) -> None:
    final = prepare(data)
    stale = own_cache / f".tmp-{final.name}-0123456789ab"
    beside = own_cache / f".tmp-{final.name}-val-0123456789ab"  # of a corpus that another process prepares
    final.rename(stale)
    beside.mkdir()
    assert prepare(data) == final and final.is_dir() and not stale.exists() and beside.is_dir()


def test_of_two_concurrent_processes_one_prepares_and_the_other_waits(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ngpt.data", str(corpus), "--tokenizer", "sentencepiece:400", "--json"]
    env = os.environ | {"NGPT_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, env=env, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert sum(stderr.count("tokenizing") for _, stderr in said) == 1
    assert said[0][0] == said[1][0]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_the_fingerprint_depends_on_content_tokenizer_and_split_not_location(
    data: DataConfig, corpus: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "elsewhere.txt"
    shutil.copy(corpus, copy)
    moved = override(data, {"corpus": str(copy)})
    assert fingerprint(moved) == fingerprint(data)
    assert fingerprint(override(moved, {"val_fraction": 0.2})) != fingerprint(data)
    assert fingerprint(override(moved, {"tokenizer": "gpt2"})) != fingerprint(data)
    copy.write_text(corpus.read_text() + " ")
    assert fingerprint(moved) != fingerprint(data)


def test_the_fingerprint_of_a_folder_depends_on_names_and_content(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    for folder, names in zip(folders, (("x", "y"), ("x", "y"), ("x", "z")), strict=True):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("text")
    a, b, c = (fingerprint(DataConfig(corpus=str(folder))) for folder in folders)
    assert a == b != c


def test_the_fingerprint_of_a_model_depends_on_its_content(corpus: Path, dataset: Dataset, tmp_path: Path) -> None:
    for name in ("a.model", "b.model"):
        shutil.copy(dataset.folder / "tokenizer.model", tmp_path / name)
    a, b = (DataConfig(corpus=str(corpus), tokenizer=str(tmp_path / name)) for name in ("a.model", "b.model"))
    assert fingerprint(a) == fingerprint(b) and vocab_size(a) == 400
    (tmp_path / "b.model").write_bytes(b"other")
    assert fingerprint(a) != fingerprint(b)


def test_a_given_model_is_used_and_copied(corpus: Path, dataset: Dataset, tmp_path: Path, own_cache: Path) -> None:
    model = tmp_path / "my.model"
    shutil.copy(dataset.folder / "tokenizer.model", model)
    again = open_dataset(DataConfig(corpus=str(corpus), tokenizer=str(model)))
    assert (again.folder / "tokenizer.model").read_bytes() == model.read_bytes()
    np.testing.assert_array_equal(np.concatenate(again.train), np.concatenate(dataset.train))


def test_a_prepared_folder_is_a_corpus_with_its_tokenizer(data: DataConfig, dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(dataset.folder, copy)
    config = DataConfig(corpus=str(copy))
    again = open_dataset(config)
    assert again.folder == copy and again.vocab_size == 400 == vocab_size(config)
    assert fingerprint(config) == fingerprint(data)
    np.testing.assert_array_equal(np.concatenate(again.train), np.concatenate(dataset.train))
    with pytest.raises(ConfigError, match="prepared already"):
        prepare(config, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["train_000.bin", "token_bytes.npy"])
def test_a_flipped_bit_in_a_prepared_folder_is_found(dataset: Dataset, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(dataset.folder, copy)
    damaged = bytearray((copy / name).read_bytes())
    damaged[-3] ^= 4
    (copy / name).write_bytes(damaged)
    with pytest.raises(CorruptShardError, match=name):
        open_dataset(DataConfig(corpus=str(copy)))


def test_shards_stay_where_they_are_and_are_split_by_name(shards: Path, own_cache: Path) -> None:
    config = DataConfig(corpus=str(shards))
    dataset = open_dataset(config)
    assert [array.tolist() for array in dataset.train] == [list(range(100)), list(range(100, 200))]
    assert [array.tolist() for array in dataset.val] == [list(range(200, 300))]
    assert dataset.vocab_size == 300 == vocab_size(config) and dataset.token_bytes is None
    assert [path.name for path in dataset.folder.iterdir()] == ["manifest.json"]


def test_moved_shards_are_the_same_corpus_and_read_from_their_new_folder(
    shards: Path, tmp_path: Path, own_cache: Path
) -> None:
    before = DataConfig(corpus=str(shards))
    prepared = prepare(before)
    key = fingerprint(before)
    shards.rename(tmp_path / "moved")
    after = DataConfig(corpus=str(tmp_path / "moved"))
    assert fingerprint(after) == key and prepare(after).name.endswith(key)
    assert len(open_dataset(after).train) == 2
    assert prepared.is_dir()


def test_without_validation_shards_the_last_shard_is_validation(shards: Path, own_cache: Path) -> None:
    (shards / "a_val_0.bin").unlink()
    dataset = open_dataset(DataConfig(corpus=str(shards)))
    assert dataset.train[0][0] == 0 and dataset.val[0][0] == 100


def test_copies_of_a_shard_are_said(shards: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copyfile(shards / "a_train_1.bin", shards / "a_val_0.bin")
    assert main([str(shards)]) == 0
    text = "shards: warning: a_val_0.bin repeats the tokens of a_train_1.bin: what is trained on may be in val too\n"
    assert text in capsys.readouterr().err


def test_the_end_of_a_single_shard_is_its_validation_split(tmp_path: Path, own_cache: Path) -> None:
    np.arange(50, dtype=np.uint16).tofile(tmp_path / "only.bin")
    config = DataConfig(corpus=str(tmp_path), val_fraction=0.2)
    dataset = open_dataset(config)
    assert dataset.train[0].tolist() == list(range(40)) and dataset.val[0].tolist() == list(range(40, 50))


def test_shards_with_their_tokenizer_know_their_bytes(dataset: Dataset, tmp_path: Path, own_cache: Path) -> None:
    for name in ("train_000.bin", "val_000.bin", "tokenizer.model"):
        shutil.copy(dataset.folder / name, tmp_path / name)
    again = open_dataset(DataConfig(corpus=str(tmp_path)))
    assert again.token_bytes is not None and dataset.token_bytes is not None
    np.testing.assert_array_equal(again.token_bytes, dataset.token_bytes)
    for split in ("train", "val"):
        assert again.manifest["splits"][split]["bytes"] == dataset.manifest["splits"][split]["bytes"]


def test_a_corrupt_shard_is_left_out_logged_and_listed(
    shards: Path, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shards / "a_train_0.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    said: list[str] = []
    prepare(DataConfig(corpus=str(shards)), log=said.append)
    assert any(str(path) in line and "CRC" in line for line in said)
    dataset = open_dataset(DataConfig(corpus=str(shards)))
    assert [skipped["name"] for skipped in dataset.manifest["skipped"]] == ["a_train_0.bin"]
    assert len(dataset.train) == 1 and str(path) in caplog.text


def flip(data: bytes, at: int) -> bytes:
    damaged = bytearray(data)
    damaged[at] ^= 1
    return bytes(damaged)


DAMAGE = {
    "CRC": lambda data: flip(data, -1),
    "its header says": lambda data: data[:-10],
    "magic": lambda data: flip(data, 0),
    "check word": lambda data: flip(data, 9),
    "shorter than its header": lambda data: data[:100],
    "is empty": lambda data: b"",
    "odd number": lambda data: b"abc",
    "out of vocabulary": lambda data: np.array([1, 300], "<u2").tobytes(),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_every_kind_of_corrupt_shard_is_skipped_or_refused_by_policy(
    shards: Path, own_cache: Path, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    path = shards / "a_train_1.bin"
    path.write_bytes(DAMAGE[reason](path.read_bytes()))
    strict = DataConfig(corpus=str(shards), on_corrupt="fail")
    with pytest.raises(ConfigError, match=rf"1 corrupt shards, and data.on_corrupt is fail: a_train_1\.bin .*{reason}"):
        open_dataset(strict)
    assert not list(own_cache.glob("*/manifest.json")) and not list(own_cache.glob(".tmp*"))
    dataset = open_dataset(DataConfig(corpus=str(shards)))
    assert [array[0] for array in dataset.train] == [0]
    assert [entry["name"] for entry in dataset.manifest["skipped"]] == ["a_train_1.bin"]
    assert f"corrupt shard left out: {path}" in caplog.text and reason in caplog.text
    with pytest.raises(ConfigError, match="leaves them out: remove it once they are repaired"):  # now from the manifest
        open_dataset(strict)


def test_all_corrupt_shards_are_named_at_once_in_one_line(
    shards: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("a_train_0.bin", "a_val_0.bin")):
        write_shard(shards / f"b{name}", np.arange(9), vocab_size=300)
        (shards / name).write_bytes(b"x" * (2 * number + 1))
    assert main([str(shards), "--on-corrupt", "fail"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "2 corrupt shards" in said and "a_train_0.bin has an odd" in said and "a_val_0.bin has an odd" in said


def test_it_is_an_error_if_every_shard_is_corrupt(shards: Path, own_cache: Path) -> None:
    for path in shards.iterdir():
        path.write_bytes(b"")
    for policy in ("skip", "fail"):
        with pytest.raises(ConfigError, match=r"has no sound shard: a_train_0\.bin is empty"):
            prepare(DataConfig(corpus=str(shards), on_corrupt=policy))


def test_a_sound_folder_is_the_same_corpus_under_either_policy(shards: Path, own_cache: Path) -> None:
    policies = [DataConfig(corpus=str(shards), on_corrupt=policy) for policy in ("skip", "fail")]
    assert len({open_dataset(config).folder for config in policies}) == 1


def test_a_dangling_link_is_a_corrupt_shard(shards: Path, own_cache: Path) -> None:
    (shards / "link_train.bin").symlink_to(shards / "nowhere")
    dataset = open_dataset(DataConfig(corpus=str(shards)))
    assert dataset.manifest["skipped"] == [{"name": "link_train.bin", "reason": "is not a file"}]


def test_a_model_that_is_too_small_for_the_shards_is_an_error_before_training(shards: Path, own_cache: Path) -> None:
    def config(size: int | None) -> TrainConfig:
        return build(TrainConfig, {"data.corpus": str(shards), "model.vocab_size": size})

    assert resolved(config(None)).model.vocab_size == 300
    assert resolved(config(301)).model.vocab_size == 301
    with pytest.raises(ConfigError, match=r"model\.vocab_size 299 is smaller than the 300 tokens"):
        resolved(config(299))
    fineweb = build(TrainConfig, {"data.corpus": "fineweb", "model.vocab_size": 50_256})
    with pytest.raises(ConfigError, match="smaller than the 50257 tokens"):
        resolved(fineweb)


def test_the_order_of_reading_is_a_setting_of_the_run_not_of_the_corpus(data: DataConfig, dataset: Dataset) -> None:
    orders = [
        override(data, changes)
        for changes in (
            {"reservoir": 7},  # this order does not use it
            {"order": "shards", "reservoir": 7},
            {"order": "reservoir", "reservoir": 7},
            {"order": "reservoir", "reservoir": 8},
        )
    ]
    assert {fingerprint(config) for config in orders} == {fingerprint(data)}
    assert [order_settings(config) for config in orders] == [
        {},
        {"data.order": "shards"},
        {"data.order": "reservoir", "data.reservoir": 7},
        {"data.order": "reservoir", "data.reservoir": 8},
    ]


def test_fingerprints_do_not_change_between_versions() -> None:
    expected = {"shakespeare": "5ac8c1ca70f5", "fineweb": "bc20c1cb8925"}
    assert {name: fingerprint(DataConfig(corpus=name)) for name in expected} == expected


def test_shakespeare_has_the_published_token_counts(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nanoGPT, data/shakespeare/readme.md. Needs the network, or NGPT_TEST_SHAKESPEARE and NGPT_TEST_GPT2."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(own_cache))
    text, folder = os.environ.get("NGPT_TEST_SHAKESPEARE"), os.environ.get("NGPT_TEST_GPT2")
    needed = [] if text else [sources.SHAKESPEARE_URL]
    needed += [] if folder else ["https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"]
    for url in needed:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=3).close()
        except OSError as error:
            pytest.skip(f"neither network nor local files: {error}")
    config = DataConfig(corpus="shakespeare", path=text, tokenizer=f"gpt2:{folder}" if folder else "gpt2")
    dataset = open_dataset(config)
    assert {split: counts["tokens"] for split, counts in dataset.manifest["splits"].items()} == {
        "train": 301_966,
        "val": 36_059,
    }


@pytest.mark.parametrize(("broken", "split"), [("a_val_0.bin", "val"), ("a_train_*.bin", "train")])
def test_a_split_without_a_sound_shard_is_an_error(shards: Path, own_cache: Path, broken: str, split: str) -> None:
    for path in shards.glob(broken):
        path.write_bytes(b"abc")
    with pytest.raises(ConfigError, match=f"no sound shard for the {split} split"):
        prepare(DataConfig(corpus=str(shards)))


def test_a_shard_that_breaks_after_preparation_is_an_error_not_left_out(shards: Path, own_cache: Path) -> None:
    config = DataConfig(corpus=str(shards))
    prepare(config)
    path = shards / "a_train_1.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(CorruptShardError, match=r"a_train_1\.bin"):
        open_dataset(config)


def test_tokens_of_another_tokenizer_are_refused_with_a_hint(tmp_path: Path, own_cache: Path) -> None:
    np.array([1, 50256] * 20, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(ConfigError, match=r"50256 is out of vocabulary.*made with data\.tokenizer sentencepiece:2048"):
        prepare(DataConfig(corpus=str(tmp_path)))


def test_shards_that_declare_another_vocabulary_are_refused(shards: Path, own_cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 300 tokens, data\.tokenizer gpt2 50257"):
        vocab_size(DataConfig(corpus=str(shards), tokenizer="gpt2"))
    write_shard(shards / "b.bin", np.arange(9), vocab_size=400)
    with pytest.raises(ConfigError, match="different tokenizers"):
        vocab_size(DataConfig(corpus=str(shards)))


def test_shakespeare_is_checked_by_its_hash_and_split_as_a_text(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    config = DataConfig(corpus="shakespeare", path=str(corpus), tokenizer="sentencepiece:400")
    with pytest.raises(ConfigError, match="is not tiny Shakespeare"):
        prepare(config)
    monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(corpus.read_bytes()).hexdigest())
    whole = corpus.read_text()
    assert texts(open_dataset(config), config)["train"] == whole[: int(len(whole) * 0.9)]


def test_shakespeare_without_network_asks_for_a_copy(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, timeout: float) -> None:
        raise urllib.error.URLError(f"no route, waited {timeout}")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(ConfigError, match=r"cannot download .*input\.txt .*data\.path \(--from PATH\)"):
        prepare(DataConfig(corpus="shakespeare"))
    assert not [path for path in own_cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "shakespear"}, "unknown corpus 'shakespear', did you mean 'shakespeare'"),
        ({"corpus": "/nowhere/at/all.txt"}, "there is no such file or folder"),
        ({"corpus": "shakespeare", "path": "/nowhere.txt"}, "no such file"),
        ({"corpus": "python-docs", "path": "x"}, "leave out data.path"),
        ({"corpus": ".", "path": "x"}, "local copy of a named corpus"),
        ({"tokenizer": "/nowhere.model"}, "no such file"),
    ],
)
def test_a_missing_file_is_an_error_of_the_user(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fingerprint(build(DataConfig, settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokenizer", "gpt3"),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("val_fraction", "0.1"),
        ("corpsu", "x"),
        ("shards", 0),
        ("order", "windws"),
        ("reservoir", 0),
        ("on_corrupt", "ignore"),
    ],
)
def test_a_bad_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        build(DataConfig, {name: value})
    assert caught.value.problems[0].location == (name,)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "no text"), (b"caf\xe9", "is not UTF-8"), (b"a" * 5, "too large for this amount")]
)
def test_a_text_that_cannot_be_used_is_an_error_of_the_user(
    tmp_path: Path, own_cache: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare(DataConfig(corpus=str(tmp_path / "a.txt")))


def test_out_is_never_overwritten_if_it_holds_something_else(data: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    assert prepare(data, out=out) == out == prepare(data, out=out)
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(DataConfig(corpus=data.corpus, tokenizer="sentencepiece:401"), out=out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        prepare(data, out=tmp_path / "full")


def test_the_command_prints_the_tokens_of_each_split(
    data: DataConfig, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([data.corpus, "--tokenizer", data.tokenizer]) == 0
    counts = {split: entry["tokens"] for split, entry in dataset.manifest["splits"].items()}
    stdout = capsys.readouterr().out
    assert f"train has {counts['train']:,} tokens\nval has {counts['val']:,} tokens\n" in stdout
    assert main([data.corpus, "--tokenizer", data.tokenizer, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["tokens"] == counts["train"]


@pytest.mark.parametrize(
    "arguments",
    [["shakespear"], ["python-docs", "--tokenizer", "gpt3"], ["python-docs", "--val-fraction", "2"]],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_an_unwritable_folder_is_exit_code_74(
    data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main([data.corpus, "--tokenizer", data.tokenizer, "--out", str(tmp_path / "file" / "x")]) == 74
    assert capsys.readouterr().err.count("\n") == 1
