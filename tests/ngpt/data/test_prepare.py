"""Tokenizing a corpus: document marks, and the same files with any number of threads and after any kill."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ngpt.data import prepare as preparation
from ngpt.data.dataset import DataConfig, Dataset, open_dataset, prepare
from ngpt.data.prepare import default_threads, encode_in_order, tokenize
from ngpt.data.sources import text_corpus
from ngpt.data.text.documents import read_documents
from ngpt.data.text.progress import silent
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer
from tests.helpers.vocabularies import write_gpt2, write_llama

# Prepares what the arguments say with shards of 2000 tokens, and gets a signal at the n-th time that it syncs a file.
KILLED = """
import os, sys
import ngpt.data.prepare as preparation
from ngpt.data.__main__ import main

preparation.SHARD_TOKENS, sync = 2000, os.fsync
number, countdown = map(int, sys.argv[1:3])

def fsync(descriptor):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), number)
    sync(descriptor)

os.fsync = fsync
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copies in /tmp
    return tmp_path / "cache"


@pytest.fixture
def pages(tmp_path: Path, corpus: Path) -> Path:
    """The text of the small corpus as two hundred documents, in two files."""
    text = corpus.read_text()
    documents = [text[300 * index : 300 * (index + 1)] for index in range(200)]
    folder = tmp_path / "pages"
    folder.mkdir()
    for name, part in (("a.jsonl", documents[:120]), ("b.jsonl", documents[120:])):
        (folder / name).write_text("".join(json.dumps({"text": document}) + "\n" for document in part))
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def split_by_hash(folder: Path, val_fraction: float) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"train": [], "val": []}
    for text in read_documents(sorted(folder.iterdir())):
        is_val = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < val_fraction * 2**64
        found["val" if is_val else "train"].append(text)
    return found


def tokens_of(dataset: Dataset) -> dict[str, list[int]]:
    return {"train": np.concatenate(dataset.train).tolist(), "val": np.concatenate(dataset.val).tolist()}


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "unigram"])
def test_each_document_starts_with_the_tokenizers_mark(pages: Path, own_cache: Path, tmp_path: Path, kind: str) -> None:
    if kind == "gpt2":
        spec, mark = f"gpt2:{write_gpt2(tmp_path / 'gpt2')}", 259
    else:
        spec, mark = str(write_llama(tmp_path / "llama.model", model_type=kind, vocab_size=290)), 1
    dataset = open_dataset(DataConfig(corpus=str(pages), tokenizer=spec))
    tokenizer = load_tokenizer(spec, None)
    documents = split_by_hash(pages, 0.1)
    assert 5 < len(documents["val"]) < 40
    for split, tokens in tokens_of(dataset).items():
        expected = [[mark, *tokenizer.encode(text).tolist()] for text in documents[split]]
        assert tokens == [token for document in expected for token in document]
        n_bytes = sum(len(text.encode()) for text in documents[split])
        assert dataset.manifest["splits"][split]["bytes"] == n_bytes
        assert dataset.token_bytes is not None and dataset.token_bytes[tokens].sum() == n_bytes


def test_without_a_mark_documents_end_with_an_empty_line(pages: Path, own_cache: Path) -> None:
    config = DataConfig(corpus=str(pages), tokenizer="sentencepiece:400")
    dataset = open_dataset(config)
    tokenizer = load_tokenizer(config.tokenizer, dataset.folder)
    for split, texts in split_by_hash(pages, 0.1).items():
        whole = "".join(text + "\n\n" for text in texts)
        assert tokenizer.decode(tokens_of(dataset)[split]) == whole
        assert dataset.manifest["splits"][split]["bytes"] == len(whole.encode())


def test_the_size_of_the_validation_split_is_the_fraction(pages: Path, own_cache: Path) -> None:
    config = DataConfig(corpus=str(pages), tokenizer="sentencepiece:400", val_fraction=0.5)
    counts = open_dataset(config).manifest["splits"]
    assert 0.35 < counts["val"]["tokens"] / (counts["val"]["tokens"] + counts["train"]["tokens"]) < 0.65


@pytest.mark.parametrize("kind", ["documents", "text"])
def test_any_number_of_threads_writes_the_same_bytes(
    pages: Path, corpus: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(preparation, "BATCH", 5000)  # characters, so that there are many batches
    monkeypatch.setattr("ngpt.data.text.documents.BLOCK", 3000)
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 2000)
    config = DataConfig(corpus=str(pages if kind == "documents" else corpus), tokenizer="sentencepiece:400")
    said: list[str] = []
    folders = [prepare(config, out=tmp_path / f"{workers}", workers=workers, log=said.append) for workers in (1, 3)]
    assert content(folders[0]) == content(folders[1])
    assert sum("in 3 threads" in line for line in said) == 1
    assert len(json.loads((folders[0] / "manifest.json").read_text())["splits"]["train"]["shards"]) > 8


TEXTS = [("val" if index % 7 == 0 else "train", f"the fox {index} thinks\n" * (1 + index % 5)) for index in range(400)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(str(write_llama(tmp_path_factory.mktemp("model") / "a.model")), None)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_texts_are_encoded_in_order(llama: Tokenizer, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BATCH", 700)
    found = list(encode_in_order(TEXTS, llama, marked=True, threads=threads))
    expected = [(split, [1, *llama.encode(text).tolist()], True) for split, text in TEXTS]
    assert [(split, ids.tolist(), same) for split, ids, same in found] == expected
    assert all(ids.dtype == np.uint16 for _, ids, _ in found)


def test_unmarked_texts_are_encoded_as_they_are(llama: Tokenizer) -> None:
    found = list(encode_in_order(TEXTS, llama, marked=False, threads=2))
    assert [ids.tolist() for _, ids, _ in found] == [llama.encode(text).tolist() for _, text in TEXTS]
    assert not any(same for *_, same in found)  # the space that such a model adds is one byte too many


def test_the_reader_is_at_most_one_batch_ahead(llama: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BATCH", 1)  # so a batch has as many texts as there are threads
    n_read, ahead = 0, []

    def reader() -> Iterator[tuple[str, str]]:
        nonlocal n_read
        for text in TEXTS:
            n_read += 1
            yield text

    for n_encoded, _ in enumerate(encode_in_order(reader(), llama, marked=True, threads=3), start=1):
        ahead.append(n_read - n_encoded)
    assert len(ahead) == len(TEXTS) and max(ahead) == 2


def test_tokenizing_uses_every_core_except_in_a_ray_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert default_threads() == 3
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/x/ray/_private/workers/default_worker.py", raising=False)
    assert default_threads() == 1


@pytest.mark.parametrize(
    ("number", "countdown"),
    [*((signal.SIGKILL, n) for n in (1, 5, 26, 100)), (signal.SIGINT, 26), (signal.SIGTERM, 40)],
)
def test_a_killed_or_interrupted_preparation_continues_to_the_same_files(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, countdown: int
) -> None:
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 2000)
    config = DataConfig(corpus=str(pages), tokenizer="sentencepiece:400")
    straight = prepare(config, out=tmp_path / "straight" / "out")
    out = tmp_path / "killed" / "out"
    arguments = [str(int(number)), str(countdown), config.corpus, "--tokenizer", config.tokenizer, "--out", str(out)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=60)
    if number == signal.SIGKILL:
        assert killed.returncode == -number, killed.stderr
    else:
        assert killed.returncode == 128 + number, killed.stderr
        assert killed.stderr.splitlines()[-1] == "interrupted; run the same command again to continue"
        assert "Traceback" not in killed.stderr
    assert not out.exists()
    (temp,) = out.parent.glob(".tmp-*")
    finished = finished_shards(temp)
    before = {name: (temp / name).stat().st_mtime_ns for name in finished}
    said: list[str] = []
    assert prepare(config, out=out, log=said.append) == out
    assert content(out) == content(straight)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == before
    assert any(f"{len(finished)} shards are already done" in line for line in said) == bool(finished)
    assert [path.name for path in out.parent.iterdir() if path.is_dir()] == ["out"]


def finished_shards(folder: Path) -> set[str]:
    """Reads the progress file: shards that it does not list are not finished."""
    path = folder / "progress.json"
    records: Any = json.loads(path.read_text())["shards"] if path.exists() else {}
    return {record["entry"]["name"] for shards in records.values() for record in shards}


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_shard_is_written_again_on_continuation(
    pages: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 2000)
    corpus = text_corpus(pages)
    how: dict[str, Any] = {"tokenizer": "sentencepiece:400", "val_fraction": 0.1}
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
        tokenize(corpus, folder=tmp_path / name, log=silent, **how)
    victim = tmp_path / "broken" / "train_003.bin"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.unlink()
    if damage != "gone":
        victim.write_bytes(data if damage == "flip" else data[:-2])
    said: list[str] = []
    made = tokenize(corpus, folder=tmp_path / "broken", log=said.append, **how)
    assert content(tmp_path / "broken") == content(tmp_path / "straight")
    whole_val = sum(entry["tokens"] == 2000 for entry in made["splits"]["val"]["shards"])
    assert f", {3 + whole_val} shards are already done" in said[0]
    assert made["splits"]["train"]["tokens"] == sum(entry["tokens"] for entry in made["splits"]["train"]["shards"])


def test_a_preparation_with_another_vocabulary_or_shard_size_is_not_continued(
    pages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = text_corpus(pages)
    out = tmp_path / "out"
    out.mkdir()
    for size in (3000, 2000):
        monkeypatch.setattr(preparation, "SHARD_TOKENS", size)
        said: list[str] = []
        tokenize(corpus, tokenizer="sentencepiece:400", val_fraction=0.1, folder=out, log=said.append)
        assert not any("there already" in line for line in said)
        sizes = [(path.stat().st_size - 1024) // 2 for path in sorted(out.glob("train_*.bin"))]
        assert sizes[:-1] == [size] * (len(sizes) - 1)


def test_lost_bytes_are_remembered_across_an_interruption(
    corpus: Path, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that folds double spaces has no bits per byte, even if only a finished shard has lost some."""
    model = write_llama(tmp_path / "folds.model", remove_extra_whitespaces=True, add_dummy_prefix=False)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 2000)
    for _ in range(2):
        made = tokenize(
            text_corpus(corpus), tokenizer=str(model), val_fraction=0.1, folder=tmp_path / "out", log=silent
        )
        assert made["token_bytes_crc32"] is None
