"""Splits by the names of files: what a name means, and that each token is in the split that the manifest says."""

import csv
import gzip
import io
import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ngpt.config.base import ConfigError
from ngpt.data import prepare as preparation
from ngpt.data.dataset import DataConfig, Dataset, fingerprint, open_dataset, prepare
from ngpt.data.splits import split_files, split_of
from ngpt.data.tokens.shards import Shard, write_shard
from ngpt.data.tokens.tokenizer import load_tokenizer, train_sentencepiece
from tests.helpers.token_files import write_llm_c, write_megatron


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lossless vocabulary."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    train_sentencepiece([document(number) for number in range(50)], 300, path)
    return path


def document(number: int) -> str:
    return f"<{number}> is the number of this document, which is {number % 7} of 7\n"


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.bin", "train"),
        ("fineweb_train_000001.bin", "train"),
        ("TinyStoriesV2-GPT4-train.txt", "train"),
        ("training.jsonl.gz", "train"),
        ("wiki.train.tokens", "train"),
        ("train-00000-of-00005.parquet", "train"),
        ("data/train-00000-of-00005-a09b74b3ef9c3b56.parquet", "train"),
        ("train00.bin", "train"),
        ("trainData.txt", "train"),
        ("TRAIN.bin", "train"),
        ("val.bin", "val"),
        ("x_val_000.bin", "val"),
        ("wiki.valid.txt", "val"),
        ("validation-00000-of-00001.parquet", "val"),
        ("dev.jsonl", "val"),
        ("ptb.test.txt", "test"),
        ("data/test/0.jsonl", "test"),
        ("data/validation/part-0.arrow", "val"),
        ("plain_text/dev/train_of_thought.txt", "val"),  # the folder is nothing but the split
        ("train/test_plan.txt", "train"),
        ("my_test_set/0.txt", "test"),
        ("news/test/2019/a.txt", "test"),
        # no split as a whole word
        ("retrieval_000.bin", None),
        ("interval.txt", None),
        ("developer.txt", None),
        ("pretraining.bin", None),
        ("latest.bin", None),
        ("contest_1.txt", None),
        ("newstest2014.txt", None),
        ("evaluation.txt", None),
        ("prétest.txt", None),
        ("a/b/c.txt", None),
    ],
)
def test_a_file_is_of_the_split_that_is_a_whole_word_of_its_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("name", ["train_val.bin", "train/test.bin", "test/val/0.txt", "my_train_test_data/0.txt"])
def test_a_name_of_two_splits_is_an_error_with_a_way_out(name: str) -> None:
    with pytest.raises(ConfigError, match=r"says \w+ and \w+: a file is in one split; rename .*--splits fraction"):
        split_of(name)


def test_a_folder_without_anything_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no file to train on: by their names, a_val\.txt, test\.txt are val or test"
    ):
        split_files(tmp_path, [tmp_path / "a_val.txt", tmp_path / "test.txt"])


# ---- corpora ---------------------------------------------------------------------------------------------------------


def config_of(folder: Path, model: Path | str = "sentencepiece:2048", **settings: str) -> DataConfig:
    return DataConfig.model_validate({"corpus": str(folder), "tokenizer": str(model), **settings})


def texts_of(dataset: Dataset, model: Path) -> dict[str, str]:
    tokenizer = load_tokenizer(str(model), None)
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {split: tokenizer.decode(np.concatenate(arrays)) for split, arrays in splits.items() if arrays}


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"<(\d+)>", text)]


def documents_of(dataset: Dataset, model: Path) -> dict[str, list[int]]:
    """The numbers of the documents of each split, in order."""
    return {split: numbers_in(text) for split, text in texts_of(dataset, model).items()}


def ids_of(dataset: Dataset) -> dict[str, list[int]]:
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {split: np.concatenate(arrays).tolist() for split, arrays in splits.items() if arrays}


def write_packed(path: Path, content: str) -> None:
    compress: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": compress_with_large_window}
    path.write_bytes(compress.get(path.suffix, bytes)(content.encode()))


def compress_with_large_window(content: bytes) -> bytes:
    return zstd.compress(content, options={zstd.CompressionParameter.window_log: 28})


def write_text(path: Path, numbers: Sequence[int]) -> None:
    write_packed(path, "".join(map(document, numbers)))


def write_csv(path: Path, numbers: Sequence[int]) -> None:
    """With line ends inside of values, and a mark of a spreadsheet."""
    content = io.StringIO()
    csv.writer(content).writerows([["id", "text"], *([number, document(number)] for number in numbers)])
    write_packed(path, "\ufeff" + content.getvalue())


def write_json_lines(path: Path, numbers: Sequence[int]) -> None:
    write_packed(path, "".join(json.dumps({"text": document(number)}) + "\n" for number in numbers))


def write_parquet(path: Path, numbers: Sequence[int]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [document(number) for number in numbers]}), path)


@pytest.mark.parametrize(
    ("names", "write"),
    [
        (("wiki.train.txt", "wiki.valid.txt", "wiki.test.txt"), write_text),
        (("train/a.txt", "dev/a.txt", "test/a.txt"), write_text),
        (("a/train.jsonl", "a/validation.jsonl", "a/test.jsonl"), write_json_lines),
        (("data/train-00000-of-00001.parquet", "data/val-0.parquet", "data/test-0.parquet"), write_parquet),
    ],
)
def test_texts_and_documents_are_split_as_they_were_published(
    tmp_path: Path, model: Path, names: tuple[str, ...], write: Callable[[Path, Sequence[int]], None]
) -> None:
    numbers = {"train": range(100), "val": range(100, 120), "test": range(120, 150)}
    for name, found in zip(names, numbers.values(), strict=True):
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "corpus" / name, found)
    said: list[str] = []
    config = config_of(tmp_path / "corpus", model)
    prepare(config, log=said.append)
    dataset = open_dataset(config)
    assert documents_of(dataset, model) == {split: list(found) for split, found in numbers.items()}
    line = f"train is {names[0]}; val is {names[1]}; test is {names[2]}, not trained on"
    assert dataset.manifest["chosen"] == line and f"corpus: {line}" in said
    assert dataset.manifest["files"] == dict(zip(("train", "val", "test"), ([name] for name in names), strict=True))


def test_a_test_split_is_said_whenever_a_corpus_is_opened(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, token, count in (("train", 1, 1000), ("val", 2, 300), ("test", 3, 400)):
        np.full(count, token, "<u2").tofile(tmp_path / f"{name}.bin")
    for _ in range(2):
        caplog.clear()
        assert ids_of(open_dataset(config_of(tmp_path))) == {"train": [1] * 1000, "val": [2] * 300, "test": [3] * 400}
        assert "test is test.bin, not trained on" in caplog.text


@pytest.mark.parametrize("finished", [1, 8, 12])
def test_an_interrupted_preparation_continues_in_any_split(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    for name, numbers in (("train", range(50)), ("val", range(50, 70)), ("test", range(70, 90))):
        write_json_lines(tmp_path / f"{name}.jsonl", numbers)
    config = config_of(tmp_path, model)
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 250)
    whole = prepare(config, out=tmp_path.parent / f"{tmp_path.name}-whole")
    n_written = 0

    def write(path: Path, *arguments: Any, **named: Any) -> Shard:
        nonlocal n_written
        if n_written == finished:
            raise KeyboardInterrupt
        n_written += 1
        return write_shard(path, *arguments, **named)

    monkeypatch.setattr(preparation, "write_shard", write)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    monkeypatch.setattr(preparation, "write_shard", write_shard)
    again = prepare(config)
    files = sorted(path.name for path in whole.iterdir())
    assert (
        sum(name.startswith("test_") for name in files) > 2 and sorted(path.name for path in again.iterdir()) == files
    )
    assert [name for name in files if (whole / name).read_bytes() != (again / name).read_bytes()] == []


def test_without_a_validation_file_it_is_taken_from_what_is_trained_on(tmp_path: Path, model: Path) -> None:
    write_json_lines(tmp_path / "train.jsonl", range(200))
    write_json_lines(tmp_path / "test.jsonl", range(200, 220))
    found = documents_of(open_dataset(config_of(tmp_path, model)), model)
    assert sorted(found["train"] + found["val"]) == list(range(200)) and 5 < len(found["val"]) < 40
    assert found["test"] == list(range(200, 220))
    (tmp_path / "text").mkdir()
    write_text(tmp_path / "text" / "a.train.txt", range(200))
    write_text(tmp_path / "text" / "a.test.txt", range(200, 220))
    texts = texts_of(open_dataset(config_of(tmp_path / "text", model)), model)
    assert numbers_in(texts["train"] + texts["val"]) == list(range(200))  # a document may be cut
    assert numbers_in(texts["test"]) == list(range(200, 220)) and 0.05 < len(texts["val"]) / len(texts["train"]) < 0.2


def test_names_that_fit_no_rule_are_trained_on_beside_a_validation_file(tmp_path: Path, model: Path) -> None:
    for name, numbers in (("a", range(10)), ("train", range(10, 20)), ("valid", range(20, 30)), ("z", range(30, 40))):
        write_json_lines(tmp_path / f"{name}.jsonl.gz", numbers)
    (tmp_path / "notes.md").write_text("not a document")
    dataset = open_dataset(config_of(tmp_path, model))
    assert documents_of(dataset, model) == {"train": [*range(20), *range(30, 40)], "val": list(range(20, 30))}
    assert dataset.manifest["left_out"]["files"] == ["notes.md"]


def test_names_can_be_ignored(tmp_path: Path, model: Path) -> None:
    for name, numbers in (("train", range(150)), ("val", range(150, 170)), ("test", range(170, 200))):
        write_json_lines(tmp_path / f"{name}.jsonl", numbers)
    found = documents_of(open_dataset(config_of(tmp_path, model, splits="fraction")), model)
    assert found.keys() == {"train", "val"} and sorted(found["train"] + found["val"]) == list(range(200))
    with pytest.raises(ConfigError, match="are for a path, not for python-docs"):
        fingerprint(DataConfig(splits="fraction"))


def test_retrieval_is_no_validation_and_the_last_of_several_shards_is(tmp_path: Path) -> None:
    for index, name in enumerate(("a_000.bin", "retrieval_000.bin", "z_000.bin")):
        write_shard(tmp_path / name, np.full(10, index), vocab_size=300)
    assert ids_of(open_dataset(config_of(tmp_path))) == {"train": [0] * 10 + [1] * 10, "val": [2] * 10}
    write_shard(tmp_path / "x_dev.bin", np.full(10, 3), vocab_size=300)
    assert ids_of(open_dataset(config_of(tmp_path))) == {"train": [0] * 10 + [1] * 10 + [2] * 10, "val": [3] * 10}


def test_a_file_named_train_never_becomes_the_validation_split_of_others(tmp_path: Path) -> None:
    for index, name in enumerate(("extra.bin", "train.bin")):
        write_shard(tmp_path / name, np.full(10, index), vocab_size=300)
    assert ids_of(open_dataset(config_of(tmp_path))) == {"train": [1] * 10, "val": [0] * 10}


def test_tokens_in_folders_of_splits_are_one_corpus(tmp_path: Path) -> None:
    for index, name in enumerate(("train/0.bin", "train/1.bin", "validation/0.bin", "test/0.bin")):
        (tmp_path / "c" / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        write_shard(tmp_path / "c" / "data" / name, np.full(10, index), vocab_size=300)
    expected = {"train": [0] * 10 + [1] * 10, "val": [2] * 10, "test": [3] * 10}
    assert ids_of(open_dataset(config_of(tmp_path / "c"))) == expected
    assert ids_of(open_dataset(config_of(tmp_path / "c" / "data"))) == expected
    (tmp_path / "c" / "other" / "train").mkdir(parents=True)
    write_shard(tmp_path / "c" / "other" / "train" / "0.bin", np.full(10, 9), vocab_size=300)
    with pytest.raises(ConfigError, match="holds token files of 2 corpora, in data, other: name one of them"):
        open_dataset(config_of(tmp_path / "c"))


def test_a_file_is_taken_whatever_its_name_says_and_a_folder_of_it_is_not(tmp_path: Path, model: Path) -> None:
    write_text(tmp_path / "test.txt", range(100))
    texts = texts_of(open_dataset(config_of(tmp_path / "test.txt", model)), model)
    assert numbers_in(texts["train"] + texts["val"]) == list(range(100))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ConfigError, match=r"no file to train on: by their names, test\.txt are val or test"):
        open_dataset(config_of(tmp_path, model))


def test_a_token_file_is_a_corpus_and_never_read_as_text(tmp_path: Path, model: Path) -> None:
    ids = np.arange(100) % 90  # as bytes, this is valid UTF-8
    ids.astype("<u2").tofile(tmp_path / "test.bin")
    found = ids_of(open_dataset(config_of(tmp_path / "test.bin")))
    assert found == {"train": ids[:90].tolist(), "val": ids[90:].tolist()}
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    np.save(tmp_path / "texts" / "b.npy", ids)
    for name in ("a.txt", "a.md"):
        (tmp_path / "texts" / "a.txt").rename(tmp_path / "texts" / name)
        with pytest.raises(ConfigError, match=r"would be read as text, but holds a token file, .*b\.npy"):
            open_dataset(config_of(tmp_path / "texts"))
        (tmp_path / "texts" / name).rename(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "a.txt").rename(tmp_path / "texts" / "README.md")
    assert ids_of(open_dataset(config_of(tmp_path / "texts")))["train"] == ids[:90].tolist()
    write_json_lines(tmp_path / "texts" / "docs.jsonl", range(100))
    found = documents_of(open_dataset(config_of(tmp_path / "texts", model)), model)
    assert sorted(found["train"] + found["val"]) == list(range(100))


# ---- what was prepared before ----------------------------------------------------------------------------------------


def test_ids_of_corpora_change_only_where_other_splits_or_widths_are_read(tmp_path: Path, model: Path) -> None:
    def key(folder: str, names: Sequence[str], **settings: str) -> str:
        for index, name in enumerate(names):
            (tmp_path / folder).mkdir(exist_ok=True)
            write_shard(tmp_path / folder / name, np.arange(10 * index, 10 * index + 10), vocab_size=300)
        return fingerprint(config_of(tmp_path / folder, **settings))

    # These were computed by the version that looked for "val" in the names of .bin files and in no others.
    assert key("a", ["a_train_0.bin", "a_val_0.bin"]) == "f19419041d9d"
    assert key("b", ["a.bin", "b.bin"]) == "1a278c2cb000"
    three, retrieval = key("c", ["train.bin", "val.bin", "test.bin"]), key("d", ["a.bin", "retrieval.bin", "z.bin"])
    assert three != BEFORE and retrieval != "c9f5a372b9a3"
    assert key("c", [], splits="fraction") == BEFORE  # the last one is validation, as it was
    (tmp_path / "t").mkdir()
    write_text(tmp_path / "t" / "a.txt", range(5))
    write_text(tmp_path / "t" / "train.txt", range(5))
    assert fingerprint(config_of(tmp_path / "t", "sentencepiece:300")) == "3d8e2f77e8e5"
    write_text(tmp_path / "t" / "valid.txt", range(5))
    assert fingerprint(config_of(tmp_path / "t", "sentencepiece:300")) != "9faf845e7027"


BEFORE = "64158cb8d1b1"  # fingerprint of train.bin, val.bin and test.bin, of which the last one was trained on


def test_a_corpus_that_was_prepared_with_other_splits_is_prepared_anew_and_never_opened(
    tmp_path: Path, own_cache: Path
) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for index, name in enumerate(("train.bin", "val.bin", "test.bin")):
        write_shard(folder / name, np.arange(10 * index, 10 * index + 10), vocab_size=300)
    new = prepare(config_of(folder))
    manifest = json.loads((new / "manifest.json").read_text())
    shutil.rmtree(new)
    splits = manifest["splits"]
    splits["train"]["shards"] = splits.pop("test")["shards"] + splits["train"]["shards"]
    old = own_cache / f"c-{BEFORE}"
    old.mkdir()
    kept = {name: value for name, value in manifest.items() if name not in ("files", "chosen")}
    (old / "manifest.json").write_text(json.dumps(kept | {"fingerprint": BEFORE}))
    said: list[str] = []
    assert prepare(config_of(folder), log=said.append) == new
    assert said[0] == f"{old} has other splits or another width of tokens: {folder} is prepared anew"
    assert ids_of(open_dataset(config_of(folder)))["test"] == list(range(20, 30))
    with pytest.raises(ConfigError, match=r"was prepared when names meant other splits.*now .*test is test\.bin"):
        open_dataset(config_of(old))


def test_wide_tokens_that_were_read_as_narrow_ones_before_are_not_read_so_again(
    tmp_path: Path, own_cache: Path
) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        (np.arange(1, 1001) % 250).astype("<u4").tofile(folder / name)
    misread = prepare(config_of(folder, token_dtype="uint16"))
    manifest = json.loads((misread / "manifest.json").read_text())
    del manifest["token_dtype"]
    (misread / "manifest.json").write_text(json.dumps(manifest))
    for corpus in (folder, misread):
        with pytest.raises(ConfigError, match=r"train\.bin has no header and looks like 32-bit tokens"):
            open_dataset(config_of(corpus))
    found = open_dataset(config_of(folder, token_dtype="uint32"))
    assert found.folder != misread and ids_of(found)["train"] == (np.arange(1, 1001) % 250).tolist()


def test_a_manifest_knows_the_format_of_its_files(tmp_path: Path) -> None:
    for name in ("train", "val"):
        write_megatron(tmp_path / f"{name}.bin", [np.arange(10), np.arange(30)], "<i4")
    dataset = open_dataset(config_of(tmp_path))
    assert {entry["format"] for entry in dataset.manifest["splits"]["train"]["shards"]} == {"Megatron int32"}
    assert dataset.manifest["files"] == {"train": ["train.bin"], "val": ["val.bin"]}
    (tmp_path / "val.idx").unlink()  # then it would be an array of 16 bits
    with pytest.raises(ConfigError, match="looks like 32-bit"):
        open_dataset(config_of(dataset.folder))
    with pytest.raises(ConfigError, match=r"no such file or folder; did you mean .*val\.bin\?"):
        open_dataset(config_of(tmp_path / "val"))


# ---- random folders --------------------------------------------------------------------------------------------------

NAMED = {
    "train": ("train{}", "a_train_{}", "x.training.{}", "train/{}", "data/train/part{}", "Train-{}-of-9"),
    "val": ("val{}", "b_val_{}", "x.valid.{}", "validation/{}", "data/dev/part{}", "wiki.dev.{}"),
    "test": ("test{}", "c-test-{}", "x.test.{}", "test/{}", "data/test/part{}", "my test {}"),
    "": ("retrieval_{}", "part{}", "interval-{}", "contest{}", "developer.{}", "sub/latest{}"),
}
Written = dict[str, tuple[str, list[int]]]  # by name: the intended split, and the numbers in the file


def random_names(draw: random.Random, suffixes: Sequence[str], *, nested: bool) -> dict[str, str]:
    """Some file names and the split that each says."""
    names = {}
    for index in range(draw.randint(1, 6)):
        split = draw.choice(["train", "train", "val", "test", ""])
        pattern = draw.choice([each for each in NAMED[split] if nested or "/" not in each])
        names[pattern.format(index) + draw.choice(suffixes)] = split
    return names


def write_random_tokens(
    folder: Path, draw: random.Random, *, count: int = 100, distance: int = 1000, vocab_size: int = 100_000
) -> Written:
    """Token files of random formats with random names; each number occurs once in the folder."""
    written: Written = {}
    nested = draw.random() < 0.3
    for index, (name, split) in enumerate(random_names(draw, [".bin", ".bin", ".npy"], nested=nested).items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.random.default_rng(draw.randrange(1 << 32)).permutation(count) + distance * index
        kind = draw.choice(["uint16", "llm.c", "llama", "megatron", "own", "wide", "garbage", "npy"])
        if path.suffix == ".npy" or kind == "npy":
            with path.open("wb") as file:
                np.save(file, ids.astype(draw.choice(["<u2", "<i4", ">i8", "<u4"])))
        elif kind == "uint16":
            ids.astype("<u2").tofile(path)
        elif kind == "wide":
            ids.astype(draw.choice(["<i4", "<u4", "<i8"])).tofile(path)
        elif kind in ("llm.c", "llama"):
            write_llm_c(path, ids, version=1 if kind == "llm.c" else 7)
        elif kind == "megatron":
            write_megatron(path, [ids[:30], ids[30:]], draw.choice(["<u2", "<i4", "<i8"]))
        elif kind == "own":
            write_shard(path, ids, vocab_size=vocab_size)
        else:
            path.write_bytes(b"\x1f\x8b\x08" + bytes(200))
        written[name] = (split, ids.tolist())
    return written


def write_random_documents(folder: Path, draw: random.Random) -> Written:
    json_lines = dict.fromkeys((".jsonl", ".jsonl.gz", ".ndjson.zst", ".json"), write_json_lines)
    tables = {".parquet": write_parquet, ".csv": write_csv, ".csv.gz": write_csv}
    return _write_numbered(folder, draw, json_lines | tables)


def write_random_texts(folder: Path, draw: random.Random) -> Written:
    return _write_numbered(folder, draw, dict.fromkeys((".txt", ".md", ".txt.gz", ".txt.zst"), write_text))


def _write_numbered(
    folder: Path, draw: random.Random, writers: dict[str, Callable[[Path, Sequence[int]], None]]
) -> Written:
    written: Written = {}
    for index, (name, split) in enumerate(random_names(draw, list(writers), nested=True).items()):
        numbers = list(range(1000 * index, 1000 * index + draw.randint(1, 30)))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        suffix = max((suffix for suffix in writers if name.endswith(suffix)), key=len)
        writers[suffix](folder / name, numbers)
        written[name] = (split, numbers)
    if draw.random() < 0.3:  # something else beside it
        (folder / "extra.npy").write_bytes(b"\x93NUMPY")
    return written


def write_random_mixture(folder: Path, draw: random.Random) -> Written:
    written = write_random_tokens(folder, draw, count=40, distance=40, vocab_size=300) if draw.random() < 0.5 else {}
    if draw.random() < 0.7:
        written |= write_random_documents(folder, draw)
    return written | write_random_texts(folder, draw) if draw.random() < 0.5 or not written else written


WRITERS = {
    "tokens": write_random_tokens,
    "documents": write_random_documents,
    "texts": write_random_texts,
    "mixture": write_random_mixture,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 40))])
def test_each_token_of_a_random_folder_is_in_the_split_that_the_manifest_says(
    tmp_path: Path, model: Path, kind: str, seed: int
) -> None:
    """Or it stops with one line."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    written = WRITERS[kind](folder, random.Random(f"{kind} {seed}"))
    config = config_of(folder, "sentencepiece:100000" if kind == "tokens" else model)
    try:
        dataset = open_dataset(config)
    except ConfigError as error:
        assert ("\n" not in str(error) and str(folder) in str(error)) or "split is empty" in str(error)
        return
    manifest = dataset.manifest
    recorded = {name: split for split in ("train", "val", "test") for name in manifest["files"].get(split, [])}
    not_read = {entry["name"] for entry in manifest["skipped"]} | {*manifest["files"].get("not read", [])}
    not_read |= {*manifest.get("left_out", {}).get("files", [])}
    assert recorded.keys() <= written.keys() and not recorded.keys() & not_read
    assert written.keys() <= recorded.keys() | not_read
    has_val = any(split == "val" for split in recorded.values())
    if manifest["shard_folder"] is not None:
        found = ids_of(dataset)
    else:
        texts = texts_of(dataset, model)
        if "left_out" not in manifest and not has_val:  # a document may be cut
            texts["train"] += texts.pop("val")
        found = {split: numbers_in(text) for split, text in texts.items()}
    where = {number: split for split, numbers in found.items() for number in numbers}
    assert len(where) == sum(map(len, found.values())), "a token is in two splits"
    assert where.keys() == {number for name in recorded for number in written[name][1]}, "a file is left out, or read"
    named_val = any(written[name][0] == "val" for name in recorded)
    for name, split in recorded.items():
        intended, numbers = written[name]
        if intended in ("val", "test") or named_val:
            assert split == (intended or "train")
        allowed = {split} if has_val or split == "test" else {"train", "val"}
        assert {where[number] for number in numbers} <= allowed, f"{name} is recorded as {split}"
