"""The corpora of a campaign on a node; tests/test_cluster_code.py prepares them on real hosts."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ngpt.data.dataset import DataConfig
from tune.cluster.node_data import expected_corpora, prepare_corpora


@pytest.fixture
def text(tmp_path: Path, corpus: Path) -> Path:
    return Path(shutil.copy(corpus, tmp_path / "text.txt"))


def node_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes `path` the cache folder from here on, as on another host."""
    monkeypatch.setenv("NGPT_CACHE", str(path))
    return path


def test_a_node_prepares_a_corpus_that_its_cache_lacks_once(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_cache(tmp_path / "here", monkeypatch)
    expected = expected_corpora([DataConfig(corpus=str(text), tokenizer="sentencepiece:400")])
    there = node_cache(tmp_path / "there", monkeypatch)
    assert prepare_corpora(expected) is None
    [manifest] = there.glob("*/manifest.json")
    written = manifest.stat().st_mtime_ns
    assert prepare_corpora(expected) is None and manifest.stat().st_mtime_ns == written


def test_a_corpus_that_differs_on_the_node_is_refused(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_cache(tmp_path / "here", monkeypatch)
    expected = expected_corpora([DataConfig(corpus=str(text), tokenizer="sentencepiece:400")])
    node_cache(tmp_path / "there", monkeypatch)
    text.write_text(text.read_text().replace("the", "The"))
    assert "its checksums differ" in str(prepare_corpora(expected))


def test_shards_with_other_checksums_are_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node_cache(tmp_path / "here", monkeypatch)
    [corpus] = expected_corpora([DataConfig(corpus=str(text), tokenizer="sentencepiece:400")])
    shards = corpus.checksums["shards"]
    shards = shards | {"train": [{**shards["train"][0], "crc32": shards["train"][0]["crc32"] ^ 1}]}
    other = replace(corpus, checksums=corpus.checksums | {"shards": shards})
    assert prepare_corpora([corpus]) is None
    assert "its checksums differ" in str(prepare_corpora([other]))


def test_a_path_that_does_not_exist_on_the_node_is_named(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_cache(tmp_path / "here", monkeypatch)
    expected = expected_corpora([DataConfig(corpus=str(text), tokenizer="sentencepiece:400")])
    node_cache(tmp_path / "there", monkeypatch)
    text.unlink()
    problem = str(prepare_corpora(expected))
    assert problem.startswith(f"cannot prepare the corpus {text}: ") and "no such file" in problem
