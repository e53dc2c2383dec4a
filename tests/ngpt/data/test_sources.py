"""Corpora that are published in parts, from a local hub and from folders."""

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import ngpt.data.text.hub as downloading
from ngpt.config.base import ConfigError
from ngpt.data.__main__ import main
from ngpt.data.dataset import DataConfig, fingerprint, open_dataset, prepare, vocab_size
from ngpt.data.tokens.shards import CorruptShardError
from tests.helpers.hub import Hub, cut_after
from tests.helpers.vocabularies import write_gpt2, write_llama
from tests.ngpt.data.text.test_documents import write_json_lines, write_parquet

NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{number:06d}.bin" for number in range(1, 104))]
PUBLISHED = 1024 + 200_000_000  # bytes of a shard of 100 million tokens


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # no server listens there
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(downloading, "FIRST_PAUSE", 0.0)
    return tmp_path / "cache"


def public_shard(number: int) -> bytes:
    tokens = np.random.default_rng(number).integers(50257, size=500 + number).astype("<u2")
    return struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0") + tokens.tobytes()


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    return write_gpt2(tmp_path / "gpt2")


@pytest.fixture
def fineweb_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub("kjj0/fineweb10B-gpt2") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.files = {name: public_shard(number) for number, name in enumerate(NAMES[:6])}
        yield hub


def test_the_fingerprint_of_fineweb_is_known_before_the_download(fineweb_hub: Hub) -> None:
    config = DataConfig(corpus="fineweb", shards=2)
    before = fingerprint(config), vocab_size(config)
    assert fineweb_hub.requests == [] and fineweb_hub.listed == 0
    fineweb_hub.faults[NAMES[1]] = [cut_after(700)]
    dataset = open_dataset(config)
    assert before == (dataset.manifest["fingerprint"], 50257) == (fingerprint(config), dataset.vocab_size)
    for arrays, numbers in ((dataset.train, (1, 2)), (dataset.val, (0,))):
        for array, number in zip(arrays, numbers, strict=True):
            np.testing.assert_array_equal(array, np.frombuffer(public_shard(number)[1024:], "<u2"))
    assert {path for path, _ in fineweb_hub.requests} == set(NAMES[:3])


def test_more_shards_are_another_corpus_and_only_new_files_are_downloaded(fineweb_hub: Hub) -> None:
    two, three = (DataConfig(corpus="fineweb", shards=count) for count in (2, 3))
    assert fingerprint(two) != fingerprint(three)
    open_dataset(two)
    fineweb_hub.requests.clear()
    assert len(open_dataset(three).train) == 3
    assert [path for path, _ in fineweb_hub.requests] == [NAMES[3]]
    assert len(open_dataset(two).train) == 2


def test_a_deleted_download_is_fetched_again(fineweb_hub: Hub, own_cache: Path) -> None:
    config = DataConfig(corpus="fineweb")
    folder = open_dataset(config).folder
    shutil.rmtree(own_cache / "downloads")
    assert open_dataset(config).folder == folder and len(fineweb_hub.requests) == 4


def test_a_changed_download_is_an_error_that_names_the_file(fineweb_hub: Hub, own_cache: Path) -> None:
    config = DataConfig(corpus="fineweb")
    folder = open_dataset(config).folder
    path = own_cache / "downloads" / "fineweb" / NAMES[1]
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(CorruptShardError, match=rf"{NAMES[1]}.*remove {folder} to prepare it again"):
        open_dataset(config)


def test_a_local_copy_of_fineweb_needs_no_network(tmp_path: Path) -> None:
    for number, name in enumerate(NAMES[:4]):
        (tmp_path / name).write_bytes(public_shard(number))
    config = DataConfig(corpus="fineweb", path=str(tmp_path), shards=2)
    dataset = open_dataset(config)
    assert [len(array) for array in dataset.train] == [501, 502] and [len(array) for array in dataset.val] == [500]
    assert dataset.manifest["fingerprint"] == fingerprint(config)
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert len(open_dataset(DataConfig(corpus="fineweb", path=str(moved), shards=2)).train) == 2


def test_local_files_count_as_the_published_corpus_only_if_their_lengths_match(tmp_path: Path) -> None:
    published = fingerprint(DataConfig(corpus="fineweb", shards=2))
    for name in NAMES[:3]:
        with (tmp_path / name).open("wb") as file:  # a sparse file needs no disk space
            file.write(struct.pack("<3i", 20240520, 1, 100_000_000))
            file.truncate(PUBLISHED)
    config = DataConfig(corpus="fineweb", path=str(tmp_path), shards=2)
    assert fingerprint(config) == published
    with (tmp_path / NAMES[2]).open("r+b") as file:
        file.truncate(PUBLISHED - 2)
    assert fingerprint(config) != published
    (tmp_path / NAMES[2]).write_bytes(public_shard(2))
    small = fingerprint(config)
    (tmp_path / NAMES[2]).write_bytes(public_shard(2)[:-2] + b"\1\1")
    assert len({published, small, fingerprint(config)}) == 3


def test_fineweb_always_has_the_tokenizer_of_gpt2(tmp_path: Path) -> None:
    default, named = DataConfig(corpus="fineweb"), DataConfig(corpus="fineweb", tokenizer="gpt2")
    assert fingerprint(default) == fingerprint(named) and vocab_size(default) == vocab_size(named) == 50257
    for spec in (str(write_llama(tmp_path / "a.model")), f"gpt2:{write_gpt2(tmp_path / 'gpt2')}"):
        with pytest.raises(ConfigError, match=r"fineweb has 50257 tokens, data\.tokenizer .* (330|260)"):
            vocab_size(DataConfig(corpus="fineweb", tokenizer=spec))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": "fineweb", "shards": 104}, "data.shards 104: fineweb has 103 training shards"),
        ({"corpus": "fineweb", "path": "."}, r"\. has no fineweb_val_000000\.bin and 1 more, which data\.shards 1"),
        ({"corpus": "shakespeare", "shards": 2}, "shakespeare does not come in parts; fineweb and openwebtext do"),
        ({"corpus": "python-docs", "shards": 2}, "python-docs does not come in parts"),
        ({"corpus": ".", "shards": 2}, "data.shards 2 is for corpora that are published in parts"),
        ({"corpus": "openwebtext", "path": "nowhere"}, "no such file: nowhere"),
    ],
)
def test_impossible_settings_are_refused_before_any_download(
    settings: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        fingerprint(DataConfig.model_validate(settings))


@pytest.mark.parametrize("corpus", ["fineweb", "openwebtext"])
def test_without_network_one_line_suggests_a_local_copy(
    corpus: str, capsys: pytest.CaptureFixture[str], own_cache: Path
) -> None:
    assert main([corpus, "--tokenizer", "gpt2"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "--from PATH" in captured.err and captured.out == ""
    assert not list(own_cache.glob("*/manifest.json"))


def test_the_command_takes_shards_and_a_local_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(NAMES[:4]):
        (tmp_path / name).write_bytes(public_shard(number))
    assert main(["fineweb", "--shards", "3", "--from", str(tmp_path), "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["splits"]["train"]["tokens"] == 501 + 502 + 503 and manifest["vocab_size"] == 50257
    with pytest.raises(SystemExit):
        main(["fineweb", "--shards", "0"])


PAGES = [[f"File {part}, page {number}: the end.\n" * 9 for number in range(30)] for part in range(3)]


@pytest.fixture
def openwebtext_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub("Skylion007/openwebtext", revision="refs/convert/parquet") as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        for part, texts in enumerate(PAGES):
            path = write_parquet(tmp_path / "page.parquet", texts)
            hub.files[f"plain_text/train/{part:04d}.parquet"] = path.read_bytes()
        yield hub


def test_openwebtext_takes_the_first_files_of_the_hub(openwebtext_hub: Hub, gpt2: Path) -> None:
    configs = [DataConfig(corpus="openwebtext", shards=count, tokenizer=f"gpt2:{gpt2}") for count in (1, 2)]
    assert len(set(map(fingerprint, configs))) == 2 and openwebtext_hub.listed == 0
    for count, config in enumerate(configs, start=1):
        dataset = open_dataset(config)
        assert dataset.manifest["fingerprint"] == fingerprint(config)
        splits = dataset.manifest["splits"].values()
        assert sum(split["bytes"] for split in splits) == sum(len(text) for part in PAGES[:count] for text in part)
        marks = sum(int((array == 259).sum()) for array in (*dataset.train, *dataset.val))
        assert marks == 30 * count
    assert [path[-12:] for path, _ in openwebtext_hub.requests] == ["0000.parquet", "0001.parquet"]


def test_downloaded_openwebtext_needs_no_network(
    openwebtext_hub: Hub, gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(DataConfig(corpus="openwebtext", shards=2, tokenizer=f"gpt2:{gpt2}"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    for count in (1, 2):
        prepare(DataConfig(corpus="openwebtext", shards=count, tokenizer="sentencepiece:290"))
    with pytest.raises(ConfigError, match="cannot download"):
        prepare(DataConfig(corpus="openwebtext", shards=3, tokenizer="sentencepiece:290"))


def test_more_files_than_the_hub_has_are_an_error(openwebtext_hub: Hub) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards 4: the hub has 3 Parquet files"):
        prepare(DataConfig(corpus="openwebtext", shards=4))


def test_local_documents_are_openwebtext_and_a_corpus_by_their_path(tmp_path: Path, gpt2: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    write_parquet(folder / "a.parquet", PAGES[0])
    write_json_lines(folder / "b.jsonl.zst", PAGES[1])
    (folder / "README.md").write_text("About the files.")
    named = DataConfig(corpus="openwebtext", path=str(folder), tokenizer=f"gpt2:{gpt2}")
    by_path = DataConfig(corpus=str(folder), tokenizer=f"gpt2:{gpt2}")
    tokens = [
        sum(split["tokens"] for split in open_dataset(config).manifest["splits"].values())
        for config in (named, by_path)
    ]
    (folder / "README.md").unlink()
    assert sum(split["tokens"] for split in open_dataset(named).manifest["splits"].values()) == tokens[1] < tokens[0]
    assert fingerprint(named) == fingerprint(by_path)
    single = DataConfig(corpus=str(folder / "a.parquet"), tokenizer=f"gpt2:{gpt2}")
    marks = [int((array == 259).sum()) for array in (*open_dataset(single).train, *open_dataset(single).val)]
    assert sum(marks) == 30
