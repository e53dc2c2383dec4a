"""What an evaluation scores by default, and that no text is read with another tokenizer than the model's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ngpt.config.base import ConfigError, override
from ngpt.data.dataset import DataConfig, Dataset, open_dataset
from ngpt.data.tokens.shards import write_shard
from ngpt.runs.eval_text import Text, data_config, open_text
from ngpt.training.checkpoint import Checkpoint
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import find_checkpoint
from tests.helpers import tiny_run


@pytest.fixture(scope="module")
def checkpoint(tiny: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("runs") / "run"
    tiny_run.run(override(tiny, {"steps": 1}), out, dataset)
    return find_checkpoint(out)


def opened(checkpoint: Checkpoint, corpus: Path | str | None, **how: Any) -> Text:
    name = None if corpus is None else str(corpus)
    config, is_own = data_config(checkpoint, corpus=name, tokenizer=how.get("tokenizer"))
    return open_text(config, checkpoint, is_own=is_own, block_size=16, **how)


@pytest.mark.parametrize(
    ("how", "split", "limit"),
    [
        ({}, "val", 256),
        ({"split": "val"}, "val", 256),
        ({"eval_tokens": "all"}, "val", None),
        ({"eval_tokens": 100}, "val", 96),
        ({"by_document": True, "split": "all"}, "all", None),
        ({"split": "train"}, "train", None),
    ],
)
def test_the_corpus_of_a_run_is_scored_as_its_training_evaluated_it_unless_more_is_asked_for(
    how: dict[str, Any], split: str, limit: int | None, checkpoint: Checkpoint
) -> None:
    text = opened(checkpoint, None, **how)
    assert (text.split, text.limit, text.trained_on) == (split, limit, True)


def test_a_copy_of_the_training_corpus_is_recognised(checkpoint: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.txt"
    copy.write_bytes(corpus.read_bytes())
    assert opened(checkpoint, copy).trained_on
    copy.write_bytes(corpus.read_bytes() + b"and more")
    assert not opened(checkpoint, copy).trained_on
    assert opened(checkpoint, copy).limit is None


def test_a_text_needs_the_tokenizer_of_the_model(tiny: TrainConfig, tmp_path: Path) -> None:
    """A model of bare tokens has none, and one that were trained on the text would fit only by its size."""
    write_shard(tmp_path / "tokens.bin", np.arange(1000) % 300, vocab_size=300)
    data = {"data.corpus": str(tmp_path / "tokens.bin"), "data.tokenizer": "sentencepiece:300"}
    config = override(tiny, data | {"steps": 1})
    tiny_run.run(config, tmp_path / "run", open_dataset(DataConfig(corpus=data["data.corpus"])))
    bare = find_checkpoint(tmp_path / "run")
    text = tmp_path / "some.txt"
    text.write_text("Some text to read, " * 100)
    with pytest.raises(ConfigError, match=r"has no tokenizer for the text of .*: name it with --tokenizer"):
        opened(bare, text)
    with pytest.raises(ConfigError, match="--tokenizer sentencepiece:300 would be trained on"):
        opened(bare, text, tokenizer="sentencepiece:300")
    found = opened(bare, tmp_path / "tokens.bin", split="all")
    assert (found.tokenizer, found.token_bytes) == (None, None)


def test_a_folder_of_test_files_is_scored_although_nothing_in_it_is_for_training(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "test.txt").write_text("Some text to read. " * 100)
    for split in (None, "all", "test"):
        text = opened(checkpoint, tmp_path, split=split)
        assert sum(len(passage.tokens) for passage in text.passages) > 100 and text.split == "all"
    with pytest.raises(ConfigError, match="holds files of test only: name one of them, or --split all"):
        opened(checkpoint, tmp_path, split="val")
    (tmp_path / "valid.txt").write_text("Another text. " * 100)
    with pytest.raises(ConfigError, match="holds files of test and val only"):
        opened(checkpoint, tmp_path)
    assert opened(checkpoint, tmp_path, split="all").split == "all"


def test_bare_tokens_that_look_wider_are_read_as_they_are_said_to_be(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (np.arange(600) % 300).astype("<u4").tofile(tmp_path / "wide.bin")
    with pytest.raises(ConfigError, match="--token-dtype uint32"):
        opened(checkpoint, tmp_path / "wide.bin")
    config, is_own = data_config(checkpoint, corpus=str(tmp_path / "wide.bin"), token_dtype="uint32")
    text = open_text(config, checkpoint, is_own=is_own, block_size=16)
    assert sum(len(passage.tokens) for passage in text.passages) == 600
