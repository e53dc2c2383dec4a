"""The corpora of a campaign: all prepared before the first trial, and described by what they really hold."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from ngpt.config import override
from ngpt.data.corpora import Dataset
from ngpt.train import TrainConfig
from tune.campaign import load_campaign
from tune.corpus import describe_data, prepare_all


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


def test_the_data_are_described_by_what_they_hold(tiny: TrainConfig, dataset: Dataset, corpus: Path) -> None:
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


def test_the_description_does_not_depend_on_how_the_batch_is_cut(tiny: TrainConfig) -> None:
    assert describe_data(override(tiny, {"batch_size": 3})) == describe_data(override(tiny, {"batch_size": 8}))


def test_the_description_is_strict_json(tiny: TrainConfig) -> None:
    assert json.loads(json.dumps(describe_data(tiny), allow_nan=False)) == describe_data(tiny)
