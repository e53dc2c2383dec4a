"""What of a corpus is scored: whole files although they are split for training, splits, and single documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ngpt.config.base import ConfigError
from ngpt.data.dataset import DataConfig, Dataset, locate, open_dataset, prepared_manifest
from ngpt.data.passages import TextPassages, TokenPassages, published_split
from ngpt.data.sources import Corpus
from ngpt.data.tokens.shards import write_shard
from ngpt.data.tokens.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from tests.helpers.vocabularies import write_gpt2, write_llama

DOCUMENTS = [f"the {number}th document, and the end of it" for number in range(60)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"gpt2:{write_gpt2(tmp_path_factory.mktemp('gpt2'))}"


@pytest.fixture(scope="module")
def marking(spec: str) -> Tokenizer:
    """A tokenizer with a mark between documents."""
    return load_tokenizer(spec, None)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer without one."""
    path = tmp_path_factory.mktemp("plain") / "plain.model"
    train_sentencepiece(DOCUMENTS, 300, path)
    return load_tokenizer(str(path), None)


def json_lines(folder: Path, *documents: str) -> Path:
    path = folder / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def texts(path: Path, tokenizer: Tokenizer, *, split: str = "all", by_document: bool = False) -> list[tuple[str, bool]]:
    """The texts of the passages, without marks, and whether they start anew."""
    source = locate(DataConfig(corpus=str(path)))
    assert isinstance(source, Corpus)
    found = TextPassages(source, tokenizer, split=split, val_fraction=0.1, by_document=by_document)
    mark = tokenizer.document_separator
    shown = [(tokenizer.decode([i for i in p.tokens.tolist() if i != mark]), p.starts) for p in found]
    assert found.lossless and found.fraction() > 0
    return shown


def test_a_text_is_read_whole_and_may_be_too_short_to_split(tmp_path: Path, plain: Tokenizer) -> None:
    path = tmp_path / "short.txt"
    path.write_text("the\n")
    assert texts(path, plain) == [("the\n", True)]


def test_documents_are_one_stream_as_in_training_or_start_anew_each(
    tmp_path: Path, plain: Tokenizer, marking: Tokenizer
) -> None:
    path = json_lines(tmp_path, *DOCUMENTS)
    assert texts(path, marking) == [(text, text == DOCUMENTS[0]) for text in DOCUMENTS]
    assert texts(path, plain) == [(f"{text}\n\n", text == DOCUMENTS[0]) for text in DOCUMENTS]
    for tokenizer in (plain, marking):
        assert texts(path, tokenizer, by_document=True) == [(text, True) for text in DOCUMENTS]


def test_drawn_documents_of_both_splits_are_all_documents(tmp_path: Path, plain: Tokenizer) -> None:
    path = json_lines(tmp_path, *DOCUMENTS)
    drawn = {
        split: [text for text, _ in texts(path, plain, split=split, by_document=True)] for split in ("train", "val")
    }
    assert drawn["val"] and sorted(drawn["train"] + drawn["val"]) == sorted(DOCUMENTS)


def test_by_document_each_file_of_a_folder_of_texts_is_one(tmp_path: Path, marking: Tokenizer) -> None:
    contents = {"a.train.txt": "the first\n", "b.valid.txt": "then the next\n", "c.test.txt": "the last\n"}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    assert texts(tmp_path, marking, by_document=True) == [(content, True) for content in contents.values()]
    assert texts(tmp_path, marking, split="test", by_document=True) == [("the last\n", True)]
    alone = tmp_path / "a.train.txt"
    with pytest.raises(
        ConfigError, match=r"the val split of a[.]train is a part of a text: documents need --split all"
    ):
        texts(alone, marking, split="val", by_document=True)


def test_a_tokenizer_that_changes_the_text_is_known_not_to_keep_its_bytes(tmp_path: Path) -> None:
    lossy = load_tokenizer(str(write_llama(tmp_path / "lossy.model", normalization_rule_name="nmt_nfkc_cf")), None)
    source = locate(DataConfig(corpus=str(json_lines(tmp_path, *DOCUMENTS))))
    assert isinstance(source, Corpus)
    found = TextPassages(source, lossy, split="all", val_fraction=0.1, by_document=False)
    assert (len(list(found)), found.documents, found.lossless) == (60, 60, False)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def open_tokens(path: Path, spec: str, **settings: Any) -> Dataset:
    return open_dataset(DataConfig(corpus=str(path), tokenizer=spec, **settings))


def passages(dataset: Dataset, **how: Any) -> list[tuple[list[int], bool]]:
    return [(p.tokens.tolist(), p.starts) for p in TokenPassages(dataset, **how)]


def test_a_token_file_whose_end_is_validation_is_one_text(tmp_path: Path, spec: str) -> None:
    write_shard(tmp_path / "a.bin", np.arange(100), vocab_size=260)
    dataset = open_tokens(tmp_path, spec)
    assert passages(dataset, split="all") == [([*range(90)], True), ([*range(90, 100)], False)]
    assert passages(dataset, split="val") == [([*range(90, 100)], True)]


def test_shards_do_not_lend_each_other_context(tmp_path: Path, spec: str) -> None:
    for name, first in (("train_0", 0), ("train_1", 50), ("val", 100)):
        write_shard(tmp_path / f"{name}.bin", np.arange(first, first + 50), vocab_size=260)
    found = passages(open_tokens(tmp_path, spec), split="all")
    assert found == [([*range(first, first + 50)], True) for first in (0, 50, 100)]


def test_documents_in_tokens_start_at_their_marks(tmp_path: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the tokens are cut while they are read."""
    tokens = [1, 2, 259, 3, 4, 259, 259, 5, 6, 7, 8, 259]
    write_shard(tmp_path / "train.bin", np.array(tokens), vocab_size=260)
    write_shard(tmp_path / "val.bin", np.array([1, 2]), vocab_size=260)
    dataset = open_tokens(tmp_path, spec)
    for chunk in (1, 2, 3, 100):
        monkeypatch.setattr("ngpt.data.passages.CHUNK", chunk)
        documents: list[list[int]] = []
        for part, starts in passages(dataset, split="train", separator=259, by_document=True):
            documents = [*documents, part] if starts else [*documents[:-1], documents[-1] + part]
        assert documents == [[1, 2], [259, 3, 4], [259], [259, 5, 6, 7, 8], [259]]


def test_tokens_without_marks_are_no_documents(tmp_path: Path, spec: str) -> None:
    write_shard(tmp_path / "a.bin", np.arange(100), vocab_size=260)
    with pytest.raises(ConfigError, match="cannot be scored by document: its tokenizer marks no documents"):
        TokenPassages(open_tokens(tmp_path, spec), split="val", by_document=True)


def test_a_split_that_does_not_exist_is_named(tmp_path: Path, spec: str) -> None:
    write_shard(tmp_path / "a.bin", np.arange(100), vocab_size=260)
    with pytest.raises(ConfigError, match="has no test split; it has train and val"):
        TokenPassages(open_tokens(tmp_path, spec), split="test")


# ---- what another corpus means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (["a.txt", "b.txt"], "all"),
        (["train.txt", "valid.txt"], "val"),
        (["train.txt", "test.txt"], "all"),
        (["a.bin", "b.bin"], "all"),
        (["train.bin", "val.bin"], "val"),
    ],
)
def test_a_corpus_with_a_published_validation_split_means_that(
    names: list[str], split: str, tmp_path: Path, spec: str
) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in names:
        if name.endswith(".bin"):
            write_shard(corpus / name, np.arange(100), vocab_size=260)
        else:
            (corpus / name).write_text("the text\n" * 100)
    assert published_split(locate(DataConfig(corpus=str(corpus)))) == split
    folder = open_tokens(corpus, spec).folder  # also where it is prepared
    source = locate(DataConfig(corpus=str(folder)))
    assert published_split(source, prepared_manifest(source)) == split
