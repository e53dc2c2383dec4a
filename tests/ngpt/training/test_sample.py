"""The text that a finished model writes: the same as by `generate`, and no number of the run depends on it."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ngpt.config.base import override
from ngpt.data.dataset import Dataset
from ngpt.ensemble.train import train_together
from ngpt.generate import generate
from ngpt.training.config import TrainConfig
from ngpt.training.load_model import load_model
from ngpt.training.sample import SAMPLE_FILE
from tests.helpers.tiny_run import assert_equal_weights, rows, run, untimed, weights


@pytest.fixture(scope="module")
def config(tiny: TrainConfig) -> TrainConfig:
    return override(tiny, {"tracker.sample_tokens": 40, "model.norm_mode": "ema", "model.norm_probability": 0.5})


@pytest.fixture(scope="module")
def finished(config: TrainConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "with"
    run(config, folder, dataset)
    return folder


def by_generate(folder: Path) -> str:
    """The text of `generate` with the same sampling."""
    return generate(load_model(folder), max_tokens=40, temperature=0.8, seed=0)


def test_the_text_is_that_of_generate_and_changes_nothing_else(
    config: TrainConfig, finished: Path, dataset: Dataset, tmp_path: Path
) -> None:
    text = (finished / SAMPLE_FILE).read_text(encoding="utf-8")
    assert len(text) > 20 and text == by_generate(finished)
    ends = []
    for tokens in (0, 40):
        torch.manual_seed(3)
        result = run(override(config, {"tracker.sample_tokens": tokens}), tmp_path / str(tokens), dataset)
        ends.append((untimed(result.metrics), result.eval_blocks, torch.get_rng_state().tolist()))
    assert ends[0] == ends[1]
    assert not (tmp_path / "0" / SAMPLE_FILE).exists() and (tmp_path / "40" / SAMPLE_FILE).read_text() == text
    assert rows(tmp_path / "0") == rows(finished)
    assert_equal_weights(weights(tmp_path / "0"), weights(finished))


def test_a_run_that_died_before_its_text_writes_it_when_resumed(
    config: TrainConfig, finished: Path, dataset: Dataset, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    text = (folder / SAMPLE_FILE).read_text()
    (folder / SAMPLE_FILE).unlink()
    run(config, folder, dataset, resume="latest")
    assert (folder / SAMPLE_FILE).read_text() == text and rows(folder) == rows(finished)
    run(override(config, {"tracker.sample_tokens": 0}), folder, dataset, resume="latest")
    assert not (folder / SAMPLE_FILE).exists()  # it would be taken for the text of this end


def test_each_run_of_a_batched_program_has_its_own_text(config: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for _ in train_together([override(config, {"seed": seed}) for seed in (1, 2)], folders, dataset=dataset):
        pass
    texts = [(folder / SAMPLE_FILE).read_text() for folder in folders]
    assert texts == list(map(by_generate, folders)) and texts[0] != texts[1]


def test_what_cannot_be_decoded_or_written_is_said_and_the_run_finishes(
    config: TrainConfig, dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = dataset.manifest | {"tokenizer": {"spec": "sentencepiece:400", "sha256": None}}
    with caplog.at_level(logging.WARNING):
        assert run(config, tmp_path / "tokens", replace(dataset, manifest=manifest)).status == "finished"
        (tmp_path / "full" / SAMPLE_FILE).mkdir(parents=True)
        assert run(config, tmp_path / "full", dataset).status == "finished"
    first, second = caplog.messages
    assert first == "the sample text was not written: no tokenizer decodes the tokens of this corpus"
    assert second.startswith("the sample text was not written (") and "directory" in second
