"""The corpora of a campaign are prepared before the first trial and described by their content."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.data.tokens import checksums
from ngpt.data.tokens.shards import CorruptShardError, write_shard
from ngpt.training.config import TrainConfig
from tune.campaign import load_campaign
from tune.session.datasets import changed_shards, check_all, describe_data, prepare_all


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_corpus_that_an_arm_uses_is_prepared_once(tmp_path: Path, corpus: Path, own_cache: Path) -> None:
    text = (
        f"campaign: c\nseeds: [1, 2]\nbase: {{corpus: '{corpus}', tokenizer: 'sentencepiece:400'}}\nphases:\n"
        "  - {name: a, vary: {tokenizer: ['sentencepiece:400', 'sentencepiece:450']}}\n"
        "  - {name: b, set: {val_fraction: 0.2}, vary: {lr: [0.1]}}\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    campaign = load_campaign(tmp_path / "c.yaml")
    said: list[str] = []
    prepare_all(campaign, said.append)
    manifests = [json.loads(path.read_text()) for path in own_cache.glob("*/manifest.json")]
    found = sorted((manifest["vocab_size"], manifest["val_fraction"]) for manifest in manifests)
    assert found == [(400, 0.1), (400, 0.2), (450, 0.1)]
    assert said
    said.clear()
    prepare_all(campaign, said.append)
    assert said == []


def test_the_description_of_the_data_matches_its_content(tiny: TrainConfig, dataset: Dataset, corpus: Path) -> None:
    config = override(tiny, {"eval_tokens": 96})
    described = describe_data(config)
    assert described["corpus"] == corpus.name
    assert described["tokenizer"] == "sentencepiece:400"
    assert described["vocab_size"] == 400
    model = (dataset.folder / "tokenizer.model").read_bytes()
    assert described["tokenizer_sha256"] == hashlib.sha256(model).hexdigest()
    tokens = np.concatenate(dataset.val)
    assert described["val_tokens"] == len(tokens)
    assert described["train_tokens"] == len(np.concatenate(dataset.train))
    # The first 96 tokens of the validation split, in windows of block_size that share their edges.
    windows = np.stack([tokens[start : start + 17] for start in range(0, 96, 16)]).astype("<i8")
    assert described["eval_tokens"] == 96
    assert described["eval_sha256"] == hashlib.sha256(windows.astype("<u2").tobytes()).hexdigest()
    assert described["skipped_shards"] == 0


def test_the_description_does_not_depend_on_the_batch_size(tiny: TrainConfig) -> None:
    assert describe_data(override(tiny, {"batch_size": 3})) == describe_data(override(tiny, {"batch_size": 8}))


def test_the_description_is_strict_json(tiny: TrainConfig) -> None:
    assert json.loads(json.dumps(describe_data(tiny), allow_nan=False)) == describe_data(tiny)


SHARDS = """
campaign: c
seeds: [1]
base: {{corpus: '{folder}', block_size: 8, tokenizer: 'sentencepiece:400'}}
phases:
  - {{name: a, vary: {{corpus: ['{folder}', '{text}']}}}}
"""


@pytest.fixture
def on_shards(tmp_path: Path, corpus: Path, own_cache: Path) -> Path:
    """The file of a campaign on a text and on shards: two for training, one for validation."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for index, name in enumerate(("a_train_0.bin", "a_train_1.bin", "a_val_0.bin")):
        write_shard(folder / name, np.arange(100 * index, 100 * index + 100), vocab_size=300)
    file = tmp_path / "c.yaml"
    file.write_text(SHARDS.format(folder=folder, text=corpus))
    return file


def test_all_shards_of_a_campaign_are_known_by_size_and_checksum(on_shards: Path) -> None:
    (shards,) = check_all(load_campaign(on_shards)).values()  # the text is covered by its fingerprint
    assert list(shards) == ["a_train_0.bin", "a_train_1.bin", "a_val_0.bin"]
    tokens = np.arange(100, 200, dtype="<u2").tobytes()
    assert shards["a_train_1.bin"] == f"1224 bytes, CRC32 {zlib.crc32(tokens):08x}"
    assert json.loads(json.dumps(shards)) == shards


def test_a_changed_shard_is_reported_with_its_old_and_new_state(on_shards: Path) -> None:
    campaign = load_campaign(on_shards)
    before = check_all(campaign)
    assert changed_shards(before, check_all(campaign)) == []
    folder = on_shards.parent / "shards"
    write_shard(folder / "a_train_0.bin", np.arange(101, 201), vocab_size=300)
    damaged = bytearray((folder / "a_train_1.bin").read_bytes())
    damaged[-1] ^= 1
    (folder / "a_train_1.bin").write_bytes(damaged)
    write_shard(folder / "a_train_2.bin", np.arange(50), vocab_size=300)
    lines = changed_shards(before, check_all(load_campaign(on_shards)))
    assert len(lines) == 3 and all(line.startswith(str(folder)) for line in lines)
    assert "a_train_0.bin: 1224 bytes, CRC32 " in lines[0] and " -> 1224 bytes, CRC32 " in lines[0]
    assert lines[1].endswith("-> left out, CRC mismatch: its tokens are not those that were written")
    assert "a_train_2.bin: missing -> 1124 bytes" in lines[2]


def test_a_flipped_bit_is_found_at_the_next_start(on_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is at fault: the file keeps its times."""
    campaign = load_campaign(on_shards)
    monkeypatch.setattr(checksums, "_last_change", lambda path: 0.0)
    monkeypatch.setattr(checksums, "_identity", lambda path: [str(path)])
    check_all(campaign)
    path = on_shards.parent / "shards" / "a_train_0.bin"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    describe_data(campaign.base)  # a worker trusts the checks of the campaign
    with pytest.raises(CorruptShardError, match=r"a_train_0\.bin: differs from the manifest"):
        check_all(campaign)


def test_other_corpora_are_not_compared() -> None:
    assert changed_shards({"one": {"a": "x"}}, {"other": {"a": "y"}}) == []
    assert changed_shards({"one": {"a": "x"}}, {"one": {}}) == ["one: a: x -> missing"]
